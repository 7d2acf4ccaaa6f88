"""NVRTC without a GPU, a driver or CuPy: compiles `kernels/cuda`, and tells what the kernels need of a multiprocessor.

`python -m mlm_mpi.backend.cuda.nvrtc sm_90a` writes every build of `kernels/cuda/builds.txt` where
`device.py` looks before it compiles (`make kernels ARCH=sm_90a`).
"""

import ctypes
import functools
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_mpi.backend.cuda.device import Defines, all_options, cubin_path, source, sources
from mlm_mpi.errors import ConfigError


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers a thread, bytes of local memory a thread, bytes of static shared memory a block."""

    registers: int
    stack_bytes: int
    spilled_bytes: int  # stores and loads
    shared_bytes: int


def builds() -> list[tuple[str, Defines]]:
    """(stem, defines) of everything the launches ask for: the lines of `kernels/cuda/builds.txt`."""
    lines = (sources() / "builds.txt").read_text().splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    return [
        (stem, tuple((key, value) for key, _, value in (word.partition("=") for word in rest))) for stem, *rest in words
    ]


def record(asked: Iterable[tuple[str, Defines]]) -> None:
    """Adds builds to `kernels/cuda/builds.txt`."""
    path = sources() / "builds.txt"
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    lines = {" ".join([stem, *(f"{key}={value}" for key, value in defines)]) for stem, defines in {*builds(), *asked}}
    path.write_text("\n".join([*head, *sorted(lines), ""]))


def runs_on(stem: str, architecture: str) -> bool:
    """Whether a source may be compiled for `architecture`: wgmma is sm_90a's alone."""
    return architecture == "sm_90a" or "hopper" not in stem


@functools.cache
def _library() -> Any:
    """libnvrtc of the nvidia-cuda-nvrtc wheel, or of a toolkit that the loader finds. Raises ConfigError if none."""
    found = importlib.util.find_spec("nvidia")
    for root in found.submodule_search_locations or () if found else ():
        for library in sorted(Path(root).glob("c*/lib/libnvrtc.so.*")):
            if builtins := sorted(library.parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(builtins[0]), ctypes.RTLD_GLOBAL)  # libnvrtc looks for it by its bare name
                return ctypes.CDLL(str(library))
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ConfigError("NVRTC is not installed: pip install nvidia-cuda-nvrtc, or a CUDA toolkit on the library path")


def _text(program: ctypes.c_void_p, size_of: str, get: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(_library(), size_of)(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(_library(), get)(program, text)
    return text.raw


def compile_cubin(stem: str, architecture: str, defines: Defines) -> tuple[bytes, str]:
    """(cubin, log of NVRTC and ptxas) of one build. Raises RuntimeError with the log where it does not compile."""
    given = (*all_options(architecture, defines), "--ptxas-options=-v")
    return compile_text(source(stem), f"{stem}.cu", given)


def compile_text(text: str, name: str, given: Sequence[str]) -> tuple[bytes, str]:
    """As `compile_cubin`, for a text by any name with any options."""
    library, program = _library(), ctypes.c_void_p()
    if library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None):
        raise RuntimeError("nvrtcCreateProgram failed")
    try:
        words = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
        failed = library.nvrtcCompileProgram(program, len(given), words)
        log = _text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode()
        if failed:
            raise RuntimeError(f"{name} with {' '.join(given)}:\n{log}")
        return _text(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN"), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def resources(log: str) -> dict[str, Resources]:
    """kernel -> what ptxas says of it."""

    def number(pattern: str, text: str) -> int:
        return sum(int(found) for found in re.findall(pattern, text))

    _, *parts = re.split(r"Compiling entry function '", log)
    return {
        part.partition("'")[0]: Resources(
            number(r"Used (\d+) registers", part),
            number(r"(\d+) bytes stack frame", part),
            number(r"(\d+) bytes spill (?:stores|loads)", part),
            number(r"(\d+) bytes smem", part),
        )
        for part in parts
    }


def main(architecture: str) -> None:
    for stem, defines in builds():
        if runs_on(stem, architecture):
            path = cubin_path(stem, architecture, defines)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(compile_cubin(stem, architecture, defines)[0])
    print(f"{sources() / 'cubin'}: {len(list((sources() / 'cubin').glob('*.cubin')))} modules")


if __name__ == "__main__":
    main(sys.argv[1])
