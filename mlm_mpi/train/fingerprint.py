"""The numerics fingerprint: everything that decides bits apart from data, weights and hyper-parameters.

Two runs promise the same bits where their fingerprints agree. Our kernels give the bits of their stated order at every
level that has a fused multiply-add, compiled by any compiler, in any number of threads; what else leads to the weights
is exact (mlm_mpi/exact.py, tests/serial/test_step_path.py). Libraries are part of the fingerprint where they compute:
an op that no kernel serves is NumPy's, whose bits differ with its version, BLAS (OpenBLAS has other kernels for Haswell
than for SkylakeX), SIMD level, libm and threads.
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
from mlm_mpi.config.rules import shares

# facts that a configuration decides -> its key
_KEYS = {
    "threads": "numerics.threads", "products": "numerics.products", "shares": "numerics.shares",
    "dtype": "train.dtype", "micro_batches": "train.micro_batches", "rows": "train.rows", "lanes": "train.lanes",
    "reduction": "comm.reduction",
}  # fmt: skip
# ops whose reference has the kernel's bits: one IEEE operation after another on each element (tests/serial/
# test_fingerprint.py)
_SAME = frozenset({"cast", "dropout", "embedding", "sgd", "sums"})


def fingerprint(config: Config, ranks: int, place: Place, plugins: dict[str, str], stable: bool) -> dict[str, Any]:
    """Named facts, plain data. `plugins`: SHA-256 of each file of --plugins in use; `stable`: of the reduction."""
    facts = {
        "mlm_mpi": mlm_mpi.__version__,
        "dtype": config.train.dtype,
        "products": config.numerics.products,
        "shares": shares(config),
        "micro_batches": config.train.micro_batches,
        "rows": config.train.rows,
        "lanes": config.train.lanes,
        "reduction": config.comm.reduction,
    }
    by_numpy: list[str] = []
    if place.on_gpu:
        facts["mesh"] = "tp and cp decide bits on a GPU: sums over k and keys have one share"
        facts["device"], facts["kernels"] = place.description, registry.summary(config.train.dtype)
        facts["cupy"] = f"{place.xp.__version__}, CUDA {place.xp.cuda.runtime.runtimeGetVersion()}"
    else:
        facts["kernels"] = registry.in_force().first.rounding
        served = registry.serving(config.train.dtype)
        by_numpy = sorted(op for op, by in served.items() if by.startswith("reference") and op not in _SAME)
    if by_numpy:
        facts["reference"] = by_numpy
    if by_numpy or plugins:  # which may call anything
        facts |= _libraries(config)
    if not stable:
        facts["ranks"] = ranks  # its order of summation is the library's
    if plugins:
        facts["plugins"] = dict(sorted(plugins.items()))
    return facts


def _libraries(config: Config) -> dict[str, Any]:
    blas = [
        f"{library['internal_api']} {library['version']} {library.get('architecture', '')} ×{library['num_threads']}"
        for library in threadpoolctl.threadpool_info()
        if library["user_api"] == "blas"
    ]
    return {
        "libc": " ".join(platform.libc_ver()),
        "numpy": np.__version__,
        "simd": np.show_config(mode="dicts")["SIMD Extensions"].get("found", []),
        "blas": blas,
        "threads": config.numerics.threads,
    }


def unforeseen(facts: dict[str, Any], fallen: dict[str, int]) -> str | None:
    """Why a run's bits are not its fingerprint's: NumPy computed what a kernel should have (`registry.fallbacks`)."""
    if not fallen or "numpy" in facts or "device" in facts:
        return None
    return f"NumPy ran where no kernel's contract held ({next(iter(fallen))})"


def digest(facts: dict[str, Any]) -> str:
    """12 hex digits that stand for a fingerprint."""
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()[:12]


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """`name: one → other` for each fact that differs, first those that both have; a key of a run has its full name."""
    changed = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    changed.sort(key=lambda name: not (name in one and name in other))  # one alone: what another fact brings with it
    return [f"{_KEYS.get(name, name)}: {one.get(name, 'none')} → {other.get(name, 'none')}" for name in changed]
