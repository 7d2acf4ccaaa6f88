"""A worker of `gpu_check.py`: names the device and measures its roofs; writes one line of JSON.

python benchmarks/gpu_facts.py '"full"'
"""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed

import cupy
import ml_dtypes
import numpy as np
from gpu_cases import Bank
from gpu_clock import LEAD_BYTES, Clock, microseconds

try:
    import torch
except ImportError:
    torch = None

QUERY = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu",
    "memory.total", "mig.mode.current", "compute_mode",
)  # fmt: skip
COPY_BYTES = {"full": 1 << 30, "small": 1 << 16}
SQUARES = {"full": (4096, 8192), "small": (64,)}


def smi() -> dict[str, str]:
    """What nvidia-smi says; nothing where there is none."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.splitlines()
    return dict(zip(QUERY, map(str.strip, said[0].split(",")), strict=False)) if said else {}


def versions() -> dict[str, Any]:
    """Of what computes here."""
    runtime = cupy.cuda.runtime
    facts = runtime.getDeviceProperties(0)
    return {
        "device": facts["name"].decode(), "capability": f"{facts['major']}.{facts['minor']}",
        "multiprocessors": facts["multiProcessorCount"], "memory_bytes": facts["totalGlobalMem"],
        "cuda_driver": runtime.driverGetVersion(), "cuda_runtime": runtime.runtimeGetVersion(),
        "cupy": cupy.__version__, "numpy": np.__version__, "python": platform.python_version(),
        "torch": torch.__version__ if torch else None,
    }  # fmt: skip


def copy_rate(clock: Clock, size: int, repeats: int) -> float:
    """Bytes a second of a copy on the device, read and written ones."""
    a, b = cupy.zeros(size, "u1"), cupy.ones(size, "u1")
    samples = clock.compare({"copy": [lambda: cupy.copyto(a, b)]}, repeats)["copy"]
    return 2e6 * size / microseconds(samples)


def product_rate(clock: Clock, size: int, dtype: np.dtype, repeats: int) -> float:
    """Floating-point operations a second of a square product of random numbers by cuBLAS."""
    bank = Bank(cupy, size)
    a, b = bank.normal(size, size, dtype=dtype), bank.normal(size, size, dtype=dtype)
    out = cupy.empty((size, size), dtype)
    run: Any = lambda: cupy.matmul(a, b, out=out)  # noqa: E731
    if torch:
        from gpu_kernels import to_tensor

        x, y, z = map(to_tensor, (a, b, out))
        run = lambda: torch.mm(x, y, out=z)  # noqa: E731
    return 2e6 * size**3 / microseconds(clock.compare({"product": [run]}, repeats)["product"])


def main() -> None:
    sizes = json.loads(sys.argv[1])
    clock, repeats = Clock(cupy, LEAD_BYTES if sizes == "full" else 1 << 12), 11 if sizes == "full" else 2
    found: dict[str, Any] = {"versions": versions(), "smi": smi()}
    found["copy"] = copy_rate(clock, COPY_BYTES[sizes], repeats)
    for dtype in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)):
        rates = {str(size): product_rate(clock, size, dtype, repeats) for size in SQUARES[sizes]}
        found[f"products_{dtype.name}"] = rates
    found["smi_after"] = smi()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
