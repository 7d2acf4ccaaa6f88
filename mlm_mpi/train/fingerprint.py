"""The numerics fingerprint: everything that decides bits apart from data, weights and hyper-parameters.

Two runs promise the same bits where their fingerprints agree. BLAS kernels and NumPy's SIMD paths are
part of it: OpenBLAS gives other bits with its Haswell kernels than with SkylakeX.
"""

import hashlib
import platform
from typing import Any

import msgspec
import numpy as np
import threadpoolctl

import mlm_mpi
from mlm_mpi.backend import registry
from mlm_mpi.backend.arrays import Place
from mlm_mpi.config import Config

# facts that a configuration decides -> its key
_KEYS = {
    "threads": "numerics.threads", "level": "numerics.level", "products": "numerics.products", "dtype": "train.dtype",
    "micro_batches": "train.micro_batches", "rows": "train.rows", "lanes": "train.lanes",
    "reduction": "comm.reduction",
}  # fmt: skip


def fingerprint(config: Config, ranks: int, place: Place, plugins: dict[str, str], stable: bool) -> dict[str, Any]:
    """Named facts, plain data. `plugins`: SHA-256 of each file of --plugins in use; `stable`: of the reduction."""
    blas = [
        f"{library['internal_api']} {library['version']} {library.get('architecture', '')} ×{library['num_threads']}"
        for library in threadpoolctl.threadpool_info()
        if library["user_api"] == "blas"
    ]
    facts = {
        "mlm_mpi": mlm_mpi.__version__,
        "libc": " ".join(platform.libc_ver()),  # logarithm and cosine of the initial values
        "numpy": np.__version__,
        "simd": np.show_config(mode="dicts")["SIMD Extensions"].get("found", []),
        "blas": blas,
        "threads": config.numerics.threads,
        "level": config.numerics.level,
        "kernels": registry.summary(config.train.dtype),
        "device": place.description,
        "dtype": config.train.dtype,
        "products": config.numerics.products,
        "micro_batches": config.train.micro_batches,
        "rows": config.train.rows,
        "lanes": config.train.lanes,
        "reduction": config.comm.reduction,
    }
    if place.on_gpu:
        facts["cupy"] = f"{place.xp.__version__}, CUDA {place.xp.cuda.runtime.runtimeGetVersion()}"
    if not stable:
        facts["ranks"] = ranks  # its order of summation is the library's
    if plugins:
        facts["plugins"] = dict(sorted(plugins.items()))
    return facts


def digest(facts: dict[str, Any]) -> str:
    """12 hex digits that stand for a fingerprint."""
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()[:12]


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """`name: one → other` for each fact that differs, first those that both have; a key of a run has its full name."""
    changed = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    changed.sort(key=lambda name: not (name in one and name in other))  # one alone: what another fact brings with it
    return [f"{_KEYS.get(name, name)}: {one.get(name, 'none')} → {other.get(name, 'none')}" for name in changed]
