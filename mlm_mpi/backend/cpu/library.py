"""The CPU kernels: finds and loads the shared library built from `kernels/cpu`; what its functions are given.

The library needs no Python headers and no NumPy; ctypes calls it, and lets go of the interpreter lock
meanwhile. Its functions carry their element type, if that is bf16, and their dispatch level as suffixes:
`gelu_forward_avx2`, `gelu_forward_bf16_avx2`.
"""

import ctypes
import os
import platform
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlm_mpi.backend.arrays import BFLOAT16
from mlm_mpi.errors import ConfigError

LEVELS = ("base", "avx2", "avx512")  # narrow to wide
LIBRARY_VARIABLE = "MLM_MPI_CPU_LIBRARY"  # another build of the library, for example with sanitizers
BF16_VARIABLE = "MLM_MPI_BF16"  # "portable": bf16 products in plain C, for tests: the same bits, far slower
BF16_LEVEL = "avx512bf16"  # has products of bf16 and nothing else

_TYPES = {"n": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float, "p": ctypes.c_void_p}
_OF_FLOATS = {
    "attention_finish": 5 * "p",
    "attention_merge": 7 * "p",
    "clip_squares": "nnnnpp",
    "crossentropy_exponentials": "nnppnp",
    "crossentropy_gradient": "nnppppf",
    "crossentropy_losses": "npppp",
    "gru_step": "nn" + 6 * "p",
    "gru_step_backward": "nn" + 6 * "p",
    "lstm_step": "nn" + 5 * "p",
    "lstm_step_backward": "nn" + 6 * "p",
    "polar_iterate": "nnnnppp",
    "polar_work": "nn",
    "sums_tree": "nnppp",
}
_OF_ELEMENTS = {
    "adamw_update": "npppp" + 9 * "f" + "p",
    "attention_backward": 10 * "p" + "fpp",
    "attention_forward": 6 * "p" + "fppp",
    "attention_work": "p",
    "crossentropy_capped": "npfp",
    "crossentropy_rows": "nnpppinpfp",
    "dropout_forward": "ppppp",
    "dropout_mask": "ppp",
    "embedding_backward": "nnpppp",
    "embedding_forward": "nnppp",
    "gelu_backward": "nppp",
    "gelu_forward": "npp",
    "gru_backward": 6 * "p",
    "gru_forward": 7 * "p",
    "layernorm_backward": "nnn" + 9 * "p" + "ip",
    "layernorm_forward": "nnpppfppp",
    "linear_bias_gradient": "nnnppip",
    "linear_work": "nn",
    "lstm_backward": 5 * "p",
    "lstm_forward": 7 * "p",
    "matmul": "pp",
    "matmul_work": "p",
    "recurrence_work": "p",
    "relu2_backward": "nppp",
    "relu2_forward": "npp",
    "rmsnorm_backward": "nnn" + 7 * "p" + "ip",
    "rmsnorm_forward": "nnppfpp",
    "rotary_backward": 9 * "p" + "ip",
    "rotary_forward": "pppppfpp",
    "rotary_work": "p",
    "swiglu_backward": "nnppp",
    "swiglu_forward": "nnpp",
}
_OF_BF16 = {f"{name}_bf16": letters for name, letters in {**_OF_ELEMENTS, "cast_to": "npp"}.items()}
SIGNATURES = _OF_FLOATS | _OF_ELEMENTS | _OF_BF16


class Library:
    """The functions of one dispatch level as attributes; arguments are numbers and addresses."""

    def __init__(self, handle: ctypes.CDLL, level: str, threads: int) -> None:
        self.handle = handle
        for name in SIGNATURES:
            setattr(self, name, _function(handle, name, level))
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, "products") if threads > 1 else None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def of(self, name: str, array: Any) -> Any:
        """The function whose elements are those of an array, float32 or bf16."""
        return getattr(self, f"{name}_bf16" if array.dtype == BFLOAT16 else name)

    @staticmethod
    def pointer(structure: Any) -> int | None:
        """The address of a ctypes structure, which the caller keeps; None stays None."""
        return None if structure is None else ctypes.addressof(structure)


def _function(handle: ctypes.CDLL, name: str, level: str) -> Any:
    function = getattr(handle, f"{name}_{level}")
    function.argtypes = [_TYPES[letter] for letter in SIGNATURES[name]]
    function.restype = ctypes.c_int64 if "_work" in name else None
    return function


def _library_path() -> str | None:
    return os.environ.get(LIBRARY_VARIABLE) or next(map(str, Path(__file__).parents[1].glob("_cpu*.so")), None)


def runs(level: str) -> bool:
    """Whether there is a library and this CPU can run its functions of that level."""
    path = _library_path()
    return path is not None and bool(ctypes.CDLL(path).level_available(level.encode()))


def load(level: str, threads: int = 1) -> tuple[str, Library | None, str]:
    """(level, library, "") or ("off", None, why not). Raises ConfigError for a level this CPU lacks."""
    if level == "off":
        return "off", None, "kernels are switched off"
    path = _library_path()
    if path is None:
        return "off", None, "no compiled library: install again with a C compiler (gcc or clang) at hand"
    try:
        handle = ctypes.CDLL(path)
        available = [name for name in LEVELS if handle.level_available(name.encode())]
    except (OSError, AttributeError) as error:
        return "off", None, f"{path} cannot be loaded ({error}): install again"
    if level not in ("auto", *available):
        raise ConfigError(f"numerics.level = {level!r} is not among what this CPU runs: {', '.join(available)}, auto")
    chosen = available[-1] if level == "auto" else level
    try:
        return chosen, Library(handle, chosen, threads), ""
    except AttributeError as error:
        return "off", None, f"{path} is of another version ({error}): install again"


def rounding(level: str) -> str:
    """What decides the bits of a level's functions: all that have a fused multiply-add give the same."""
    if level == "off":
        return "no kernels"
    fused = level != "base" or platform.machine() == "aarch64"
    return "fused multiply-add" if fused else f"no fused multiply-add (base level of {platform.machine()})"


def take_bf16(library: Library | None) -> str:
    """How the library multiplies bf16: by the instruction, where it may. Raises ConfigError where nothing can."""
    wanted = 'numerics.products = "bf16"'
    if library is None:
        raise ConfigError(f'{wanted} needs the C kernels, and there are none here: set numerics.products = "float32"')
    if os.environ.get(BF16_VARIABLE) == "portable":
        return f"bf16 products in plain C, {BF16_VARIABLE}=portable"
    if not library.handle.level_available(BF16_LEVEL.encode()):
        raise ConfigError(
            f"{wanted} needs a CPU with AVX512-BF16 (Cooper Lake, Sapphire Rapids, Zen 4 or later), and this one has "
            'none: set numerics.products = "float32"'
        )
    for name in ("matmul_bf16", "matmul_work_bf16"):
        setattr(library, name, _function(library.handle, name, BF16_LEVEL))
    return f"bf16 products by {BF16_LEVEL}"


# ---- arguments


def at(array: Any) -> int | None:
    """The address of an array's first element; None stays None."""
    return None if array is None else array.ctypes.data


class Draw(ctypes.Structure):
    """`struct draw` of kernels/cpu/dropout.c: an `ops.dropout.Draw`."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("key0", "key1", "step", "micro_batch")),
        *((name, ctypes.c_float) for name in ("rate", "factor")),
        ("start", ctypes.c_uint64),
        ("stride", 3 * ctypes.c_uint64),
    ]


def c_draw(draw: Any, start: int, strides: Iterable[int]) -> Draw:
    """A draw of `ops/dropout.py` as the C functions take it: rows in up to three dims, the first one at `start`."""
    low = 0xFFFFFFFF
    words = (*draw.key, draw.step & low, draw.micro_batch & low)
    return Draw(*words, draw.rate, 1.0 / (1.0 - draw.rate), start, (3 * ctypes.c_uint64)(*strides))
