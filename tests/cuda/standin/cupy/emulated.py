"""`cupy.RawModule` whose kernels are compiled by g++ and run on the CPU, one fiber per CUDA thread."""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from . import graph, memory

ROOT = Path(__file__).parents[4]
EMULATOR = ROOT / "kernels" / "cuda" / "emulator"
CACHE = Path(os.environ.get("MLM_MPI_EMULATOR_CACHE", ROOT / "build" / "emulated"))
FLAGS = os.environ.get("MLM_MPI_EMULATOR_FLAGS", "-O2").split()  # sanitizers, or a planted bug's -D

COMPILER = ["g++", "-x", "c++", "-std=c++17", "-fPIC", "-shared", f"-I{EMULATOR}"]
_KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__\w+__\s*\([^)]*\)\s*)*(\w+)\s*\(')
_state = {"seed": 0}


def seed(number):
    """The order in which threads run from now on; 0 is the order of their numbers."""
    _state["seed"] = number


def built(command, text, inputs, name):
    """A shared library of g++, from the cache if the command, the text and the `inputs` are as they were."""
    parts = [" ".join(command), text, *(path.read_text() for path in inputs)]
    folder = CACHE / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as part:
            subprocess.run([*command, "-", "-o", part.name], input=text.encode(), check=True)
        Path(part.name).replace(folder / name)
    return folder / name


def load_driver():
    """A driver under the name that `ctypes.CDLL("libcuda.so.1")` looks for: what is loaded already is found first."""
    soname = "libcuda.so.1"
    command = [*COMPILER, f"-Wl,-soname,{soname}"]
    text = (EMULATOR / "driver.cpp").read_text()
    return ctypes.CDLL(str(built(command, text, [EMULATOR / "tensor_map.h"], soname)))


class RawModule:
    def __init__(self, code=None, path=None, options=(), backend="nvrtc"):
        self.code, self.options = code, options
        self.library = None

    def compile(self):
        names = _KERNEL.findall(self.code)
        # not -D: the emulator's own headers come before the text
        defines = [option[2:].replace("=", " ", 1) for option in self.options if option.startswith("-D")]
        lines = [*(f"#define {define}" for define in defines), "#line 1", self.code]
        text = "\n".join([*lines, *(f"CU_KERNEL({name})" for name in names), ""])
        command = [
            *COMPILER,
            "-march=native",
            "-fno-weak",
            "-fno-strict-aliasing",
            "-w",
            "-Wno-psabi",
            "-include",
            "emulator.h",
            *FLAGS,
        ]
        target = built(command, text, sorted(EMULATOR.glob("*.h")), "kernels.so")
        self.library = ctypes.CDLL(str(target))
        self.library.cu_error.restype = ctypes.c_char_p

    def get_function(self, name):
        if self.library is None:
            self.compile()
        return Function(self.library, name)


class Function:
    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self, library, name):
        self.library, self.name, self.launch = library, name, getattr(library, f"cu_launch_{name}")

    def __call__(self, grid, block, args, shared_mem=0):
        graph.change(lambda: self._run(grid, block, args, shared_mem))

    def _run(self, grid, block, args, shared_mem):
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise RuntimeError(f"{self.name}: {shared_mem} bytes of shared memory were not asked for")
        sizes, values = [], []
        for value in args:
            value = _by_value(value)
            values.append(value)
            sizes.append(value.nbytes)
        count = len(values)
        shapes = [(ctypes.c_uint * 3)(*(*(int(n) for n in extent), 1, 1)[:3]) for extent in (grid, block)]
        code = self.launch(
            *shapes, ctypes.c_size_t(shared_mem), (ctypes.c_void_p * count)(*(v.ctypes.data for v in values)),
            (ctypes.c_size_t * count)(*sizes), count, ctypes.c_uint64(_state["seed"]),
        )  # fmt: skip
        if code == -2:
            raise RuntimeError(f"{self.name}: {_located(self.library.cu_error().decode())}")
        if code:
            raise TypeError(
                f"{self.name}: " + ("wrong number of arguments" if code < 0 else f"size of argument {code - 1}")
            )
        if damage := memory.damage():
            raise RuntimeError(f"{self.name}: {damage}")


def _located(error):
    """The emulator knows addresses only: where they lie."""
    address = re.search(r"invalid address (0x[0-9a-f]+)", error)
    return f"{error}, {memory.nearest(int(address[1], 16))}" if address else error


def _by_value(value):
    import cupy

    if isinstance(value, cupy.ndarray):
        return np.array(value.data.ptr, np.uint64)
    if value is None:
        raise TypeError("CuPy gives the driver no argument for None: pass np.uint64(0)")
    if isinstance(value, np.ndarray) and value.dtype.kind != "V":
        raise TypeError("a NumPy array is not in device memory")
    if isinstance(value, (bool, int, float)):
        raise TypeError("pass NumPy scalars: their width is the kernel's")
    return np.asarray(value)
