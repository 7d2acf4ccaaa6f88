"""Why arguments do not fit a C kernel, or "": the contracts that launches share."""

from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import BFLOAT16

FLOAT32 = np.dtype(np.float32)
MOST_SHARES = 64  # HALVINGS of kernels/cpu/product.h


def dense(*arrays: Any, dtype: Any = FLOAT32) -> str:
    """Every array (None is left out) lies in this machine's memory, C-contiguous and aligned, of that dtype."""
    for array in arrays:
        if array is None:
            continue
        if not isinstance(array, np.ndarray):
            return "not in the CPU's memory"
        if array.dtype != dtype:
            return str(array.dtype)
        if not (array.flags.c_contiguous and array.flags.aligned):
            return "not contiguous"
    return ""


def elements(*arrays: Any) -> str:
    """Every array (None is left out) is `dense`, and either all have float32 or all have bf16."""
    for x in arrays:
        if x is not None:
            return dense(*arrays, dtype=BFLOAT16 if x.dtype == BFLOAT16 else FLOAT32)
    return ""


def shaped(shape: tuple[int, ...], *arrays: Any) -> str:
    """Every array (None is left out) has that shape: nothing is broadcast."""
    return "" if all(a is None or a.shape == shape for a in arrays) else "shapes differ"


def halved(extent: int, shares: int, segments: int = 1) -> str:
    """Every segment of an extent has equal shares, which halving again and again gives."""
    if shares < 1 or shares & (shares - 1) or shares > MOST_SHARES:
        return f"{shares} shares"
    return f"{extent} in {segments} x {shares} shares" if extent % (shares * segments) else ""


def within(ids: Any, stop: int) -> str:
    """Dense int32 in [0, stop)."""
    inside = ids.size == 0 or 0 <= ids.min() <= ids.max() < stop
    return dense(ids, dtype=np.int32) or ("" if inside else "out of bounds")


def equal_groups(x: Any, pieces: int) -> str:
    """The rows of x fall into that many equal groups."""
    return "" if pieces > 0 and x.shape[0] % pieces == 0 else "rows do not fall into equal pieces"
