"""Why arguments do not fit a CUDA kernel, or "": the contracts that launches share."""

from typing import Any

import numpy as np

ELEMENTS = {"float32": "float", "bfloat16": "bf16"}  # NumPy's name of a dtype -> kernels/cuda/common.cuh's


def on_device(array: Any) -> bool:
    """Whether an array lies in a GPU's memory."""
    return type(array).__module__.partition(".")[0] == "cupy"


def element(array: Any) -> str:
    """The kernels' name of an array's dtype."""
    return ELEMENTS[array.dtype.name]


def dense(*arrays: Any, dtype: Any = None) -> str:
    """Every array (None is left out) is C-contiguous on the device, of one dtype: `dtype`, or float32 or bfloat16."""
    wanted = None if dtype is None else np.dtype(dtype)
    for array in arrays:
        if array is None:
            continue
        if not on_device(array):
            return "not in the GPU's memory"
        wanted = wanted or array.dtype
        if array.dtype != wanted or (dtype is None and array.dtype.name not in ELEMENTS):
            return str(array.dtype)
        if not array.flags.c_contiguous:
            return "not contiguous"
    return ""


def shaped(shape: tuple[int, ...], *arrays: Any) -> str:
    """Every array (None is left out) has that shape: nothing is broadcast."""
    return "" if all(array is None or array.shape == shape for array in arrays) else "shapes differ"


def width(*arrays: Any, columns: int = 0) -> int:
    """How many elements a thread moves at a time: 16 bytes of the narrowest dtype, or 1 where that cannot be.

    It cannot where an array, or a row of `columns` elements, does not begin on a multiple of 16 bytes. CuPy's arrays
    and the parameters of a FlatStore do.
    """
    present = [array for array in arrays if array is not None]
    pack = 16 // min(array.itemsize for array in present)
    return pack if columns % pack == 0 and all(array.data.ptr % 16 == 0 for array in present) else 1
