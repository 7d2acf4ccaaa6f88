"""A GPU: its capability, and the functions of `kernels/cuda` compiled for it.

A source is one string: its own `#include "x.cuh"` are resolved here, so that CuPy's cache of compiled
modules, which does not look into headers, can never serve an old one.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlm_mpi.backend.arrays import CUPY
from mlm_mpi.errors import ConfigError

SPECIFIC = (90, 100, 103, 120)  # chips with instructions that only `-arch=sm_XXa` allows
SPECIFIC_SINCE = (12, 9)  # NVRTC takes the second -arch, which CuPy appends; 12.2 to 12.8 refuse it (tried)
# that decide bits: as CuPy says, then NVRTC's defaults
ARITHMETIC = ("-ftz=true", "-prec-div=true", "-prec-sqrt=true", "-fmad=true")
STATIC_SHARED_BYTES = 48 << 10  # above this a kernel has to ask for its dynamic shared memory

Defines = tuple[tuple[str, Any], ...]  # (macro, value) in the order of their names
_NULL = np.uint64(0)  # CuPy hands None to the driver as an argument that is missing, not as a null pointer
_INCLUDE = re.compile(r'^#include "([^"]+)"[^\n]*\n', re.MULTILINE)


def sources() -> Path:
    """The folder `kernels/cuda`: of the installed package, or of the checkout."""
    installed = Path(__file__).parents[2] / "kernels" / "cuda"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "kernels" / "cuda"


def source(stem: str, folder: Path | None = None) -> str:
    """`<stem>.cu` of `kernels/cuda`, or of another folder, with its includes in place, each once."""
    seen: set[str] = set()
    places = [folder or sources(), sources()]

    def resolve(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        path = next(place / name for place in places if (place / name).exists())
        text = path.read_text().replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda match: resolve(match[1]), text)

    return resolve(f"{stem}.cu")


def options(architecture: str, defines: Defines) -> tuple[str, ...]:
    """Every option of a build for `architecture` (sm_80, sm_90a, …) with these macros, made beforehand or at run time.

    What decides bits is stated, defaults too: neither NVRTC's nor what a version of CuPy appends may change it.
    """
    # CuPy appends -arch=sm_90; NVRTC keeps the "a" of an earlier -arch of the same number
    specific = (f"-arch={architecture}",) if architecture.endswith("a") else ()
    return ("-std=c++17", *ARITHMETIC, *specific, *(f"-D{key}={value}" for key, value in defines))


def all_options(architecture: str, defines: Defines) -> tuple[str, ...]:
    """What NVRTC is told in the end: our options and what CuPy 14 appends to them (its cuda/compiler.py)."""
    appended = (f"-arch={architecture.rstrip('a')}", "--device-as-default-execution-space")
    return (*options(architecture, defines), *appended)


def cubin_path(stem: str, architecture: str, defines: Defines) -> Path:
    """Where a build made beforehand (`make kernels`) is looked for; its name changes with source and options."""
    text = "\0".join((source(stem), *all_options(architecture, defines)))
    return sources() / "cubin" / f"{stem}-{architecture}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.cubin"


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Ranks of a node compile one after another: the first fills the cache, the others find it full."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "mlm_mpi.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cache_folder() -> Path:
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


@functools.cache
def _encode() -> Any:
    """The driver's cuTensorMapEncodeTiled, with the types of its arguments (cuda.h)."""
    encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    word, longs, words = ctypes.c_uint32, ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32)
    # out, type, rank, address, sizes, strides, box, steps; then interleave, swizzle, L2 promotion, fill: enumerations
    enums = [ctypes.c_int] * 4
    encode.argtypes = [ctypes.c_void_p, ctypes.c_int, word, ctypes.c_void_p, longs, longs, words, words, *enums]
    encode.restype = ctypes.c_int
    return encode


def _check_compiler(cupy: Any, architecture: str) -> None:
    """Raises ConfigError where the NVRTC that CuPy finds cannot compile the kernels."""
    try:
        version = cupy.cuda.nvrtc.getVersion()
    except RuntimeError:  # cuda.pathfinder's DynamicLibNotFoundError
        raise ConfigError(f"CuPy finds no NVRTC to compile kernels with: {CUPY}") from None
    if architecture.endswith("a") and version < SPECIFIC_SINCE:
        found, needed = (".".join(map(str, numbers)) for numbers in (version, SPECIFIC_SINCE))
        raise ConfigError(
            f"CuPy finds NVRTC {found}, kernels for {architecture} need {needed} or newer: "
            f"pip install 'nvidia-cuda-nvrtc-cu12>={needed}', or a newer CUDA toolkit"
        )


class Device:
    """The current GPU. `capability` (9, 0) on Hopper; `processors`: its multiprocessors.

    Raises ConfigError where no compiler, or too old a one, is found for it.
    """

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self.builds: set[tuple[str, Defines]] = set()  # what was asked for
        device = cupy.cuda.Device()
        digits = device.compute_capability
        self.capability = int(digits[:-1]), int(digits[-1])
        self.processors: int = device.attributes["MultiProcessorCount"]
        _check_compiler(cupy, self.architecture)

    @property
    def architecture(self) -> str:
        """What NVRTC compiles for: sm_80, sm_90a, …"""
        number = 10 * self.capability[0] + self.capability[1]
        return f"sm_{number}a" if number in SPECIFIC else f"sm_{number}"

    def function(self, stem: str, name: str, shared_bytes: int = 0, **defines: Any) -> Callable[..., None]:
        """`name` of `kernels/cuda/<stem>.cu` compiled with these macros: call it with (grid, block, args, shared_mem=).

        `shared_bytes`: the most dynamic shared memory any launch will ask for.
        """
        return self._function(stem, name, shared_bytes, tuple(sorted(defines.items())))

    @functools.cache  # noqa: B019  one device a process
    def _function(self, stem: str, name: str, shared_bytes: int, defines: Defines) -> Any:
        function = self._module(stem, defines).get_function(name)
        if shared_bytes > STATIC_SHARED_BYTES:
            function.max_dynamic_shared_size_bytes = shared_bytes

        def launch(grid: Any, block: Any, args: tuple[Any, ...], shared_mem: int = 0) -> None:
            function(grid, block, tuple(_NULL if a is None else a for a in args), shared_mem=shared_mem)

        return launch

    @functools.cache  # noqa: B019
    def _module(self, stem: str, defines: Defines) -> Any:
        self.builds.add((stem, defines))
        made = cubin_path(stem, self.architecture, defines)
        if made.exists():
            return self.cupy.RawModule(path=str(made))
        module = self.cupy.RawModule(code=source(stem), options=options(self.architecture, defines))
        with _one_at_a_time(_cache_folder()):
            module.compile()
        return module

    def tensor_map(self, array: Any, box: tuple[int, ...], swizzle_bytes: int = 128) -> Any:
        """A TMA descriptor of a bf16 or float32 array, passed to a kernel by value.

        `box`: the tile a load brings, dims as in `array.shape`; the innermost dim of the array is contiguous.
        The descriptor holds the address, not the array: the caller keeps the array until the launch.
        Raises ValueError where the driver refuses (a base or pitch that is no multiple of 16 bytes).
        """
        memory = np.zeros(192, np.uint8)
        skip = -memory.ctypes.data % 64  # the driver wants 64-byte alignment
        out = memory[skip : skip + 128]
        kinds = {2: 9, 4: 7}  # bytes an element -> CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, _FLOAT32
        rank = array.ndim
        shape = (ctypes.c_uint64 * rank)(*array.shape[::-1])
        strides = (ctypes.c_uint64 * max(1, rank - 1))(*array.strides[::-1][1:])
        tile = (ctypes.c_uint32 * rank)(*box[::-1])
        steps = (ctypes.c_uint32 * rank)(*[1] * rank)
        swizzle = {0: 0, 32: 1, 64: 2, 128: 3}[swizzle_bytes]
        kind, pointer = kinds[array.itemsize], array.data.ptr
        code = _encode()(out.ctypes.data, kind, rank, pointer, shape, strides, tile, steps, 0, swizzle, 2, 0)
        if code:
            raise ValueError(f"cuTensorMapEncodeTiled: error {code} for {array.shape}, strides {array.strides}, {box}")
        return out.view("V128")
