"""Records what the kernels of this CPU compute, so that `replay.c` can compare another instruction set with it.

The cases are those of tests/serial/test_kernels.py. Every C function they reach is written down with its arguments, the
memory it is given and the memory it leaves. All of that memory lies in an arena at one address, which the replaying
program maps too: a recorded pointer, also one inside a structure, needs no translation.

    python tests/isa/record.py build/isa        writes build/isa/calls.bin and build/isa/functions.h
"""

import ctypes
import mmap
import platform
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "serial"))
import test_kernels

from mlm_mpi.backend import choice
from mlm_mpi.backend.arrays import BFLOAT16
from mlm_mpi.backend.cpu import library
from mlm_mpi.backend.cpu.matmul import ONE_ROW
from mlm_mpi.backend.cpu.provider import KERNELS

ARENA = (64 << 30) + (384 << 20)  # free in a process, and where bochs/rom.S maps it
MOST_BYTES = (384 - 32) << 20  # of the calls, which bochs/bare.c reads to the memory before it
ARENA_BYTES = 64 << 20
POISON = 0xFF  # a NaN: what is read without having been written shows
EXTREMES = {"finite": (-0.0, 1e-42, -3e-39, 1e30, -1e30), "not finite": (np.nan, np.inf, -np.inf)}

ROOM = 4  # work space, which is a level's own affair, grows at most so much from AVX2: twice the padding in two dims

SECTOR = 512  # the file is the disk of an emulated machine
HEAD = struct.Struct("=qq")  # calls, bytes
LABEL_BYTES, MAX_ARGUMENTS = 64, 16
CALL = struct.Struct(f"={LABEL_BYTES}sqqq{8 * MAX_ARGUMENTS}s")  # label, function, arena bytes, chunks, arguments
CHUNK = struct.Struct("=qqqq")  # address, bytes, bytes of a float or bf16 or 1, whether the call changes it


class Arena:
    """Memory at a fixed address, handed out from its start; every piece lies 8 bytes behind a 64-byte line, so that
    a kernel that counts on more alignment than floats have is found out."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if libc.mmap(ARENA, ARENA_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != ARENA:
            sys.exit(f"no memory can be had at {ARENA:#x}")
        self.memory = np.frombuffer((ctypes.c_ubyte * ARENA_BYTES).from_address(ARENA), np.uint8)
        self.used, self.pieces = 0, {}

    def clear(self) -> None:
        self.memory[: self.used] = POISON
        self.used, self.pieces = 0, {}  # address -> (bytes, element)

    def take(self, size: int, dtype: Any) -> int:
        """Offset of a new piece of `size` bytes."""
        offset = (self.used + 63) // 64 * 64 + 8
        self.used = offset + size
        assert self.used <= ARENA_BYTES, "the arena is too small"
        dtype = np.dtype(dtype)
        self.pieces[ARENA + offset] = size, dtype.itemsize if dtype.kind == "f" or dtype == BFLOAT16 else 1
        return offset

    def empty(self, shape: Any, dtype: Any = "f8") -> np.ndarray:
        """What np.empty gives, in the arena."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.ndarray(shape, dtype, self.memory, self.take(size, dtype))

    def like(self, x: np.ndarray) -> np.ndarray:
        return self.empty(x.shape, x.dtype)

    def sorting(self, inner: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        """`inner`, whose result a launch hands to a kernel, in the arena."""

        def into_arena(x: np.ndarray, **how: Any) -> np.ndarray:
            found = inner(x, **how)
            held = self.like(found)
            held[...] = found
            return held

        return into_arena

    def copy(self, x: np.ndarray, copied: dict[int, int]) -> np.ndarray:
        """A copy with the same strides; views of one array stay views of one array (`copied`: its id -> offset)."""
        root = x
        while isinstance(root.base, np.ndarray):
            root = root.base
        if id(root) not in copied:
            flat = root.ravel("K")
            copied[id(root)] = self.take(root.nbytes, x.dtype)
            np.ndarray(flat.shape, flat.dtype, self.memory, copied[id(root)])[...] = flat
        offset = copied[id(root)] + x.ctypes.data - root.ctypes.data
        return np.ndarray(x.shape, x.dtype, self.memory, offset, x.strides)

    def pointer(self, structure: Any) -> int | None:
        """The address of a copy of a ctypes structure."""
        if structure is None:
            return None
        data = bytes(structure)
        offset = self.take(len(data), np.uint8)
        self.memory[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        return ARENA + offset

    def contents(self) -> dict[int, bytes]:
        return {at: self.memory[at - ARENA :][:size].tobytes() for at, (size, _) in self.pieces.items()}


class Recorder:
    """A library of kernels that notes every call it passes on: name, arguments, memory before, memory after."""

    threads = 1

    def __init__(self, library: Any, arena: Arena) -> None:
        self._library, self._arena = library, arena
        self.pointer = arena.pointer
        self.calls: list[tuple[str, tuple[Any, ...], dict[int, bytes], dict[int, bytes]]] = []
        self.seen: set[str] = set()  # names of all functions called

    def of(self, name: str, array: np.ndarray) -> Any:
        return library.Library.of(self, name, array)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def call(*arguments: Any) -> Any:
            if function.restype is not None:  # floats of work space
                return ROOM * function(*arguments)
            self.seen.add(name)
            for letter, value in zip(library.SIGNATURES[name], arguments, strict=True):
                inside = letter != "p" or value is None or 0 <= value - ARENA < self._arena.used
                assert inside, f"{name} is given memory outside the arena"
            before = self._arena.contents()
            function(*arguments)
            self.calls.append((name, arguments, before, self._arena.contents()))

        return call


def record(name: str, case: Any, label: str, recorder: Recorder, arena: Arena) -> list[bytes]:
    """The calls that one case of a registered kernel leads to, as `replay.c` reads them."""
    arena.clear()
    copied: dict[int, int] = {}
    arguments = [in_arena(x, arena, copied) for x in case[0]]
    given, entry = set(arena.pieces), KERNELS.entries()[name.removesuffix(test_kernels.OF_BF16)]
    reason = entry.contract(*arguments)
    if reason == ONE_ROW:
        return []
    assert not reason, f"{label}: {reason}"
    with mock.patch.multiple(np, empty=arena.empty, empty_like=arena.like, argsort=arena.sorting(np.argsort)):
        result = entry.launch(recorder, *arguments)
    returned = [x.ctypes.data for x in (result if isinstance(result, tuple) else (result,)) if x is not None]

    def counts(at: int) -> bool:
        """Whether a piece is more than work space: given, returned, or a structure."""
        size, element = arena.pieces[at]
        return at in given or element == 1 or any(at <= address < at + size for address in returned)

    calls = []
    for function, values, before, after in recorder.calls:
        chunks = [chunk(at, arena.pieces[at][1], data, after[at]) for at, data in before.items() if counts(at)]
        numbers = b"".join(map(argument, library.SIGNATURES[function], values))
        place = sorted(library.SIGNATURES).index(function)
        calls.append(CALL.pack(label.encode(), place, arena.used, len(chunks), numbers) + b"".join(chunks))
    recorder.calls.clear()
    return calls


def in_arena(x: Any, arena: Arena, copied: dict[int, int]) -> Any:
    """An argument with its arrays copied to the arena."""
    if isinstance(x, list | tuple) and any(isinstance(each, np.ndarray) for each in x):
        return [in_arena(each, arena, copied) for each in x]
    return arena.copy(x, copied) if isinstance(x, np.ndarray) else x


def argument(letter: str, value: Any) -> bytes:
    """One argument in 8 bytes, as the union in replay.c."""
    return struct.pack({"n": "=q", "i": "=i4x", "f": "=f4x", "p": "=q"}[letter], value or 0)


def chunk(at: int, element: int, before: bytes, after: bytes) -> bytes:
    changed = before != after
    fill = bytes(-len(before) % 8)
    return CHUNK.pack(at, len(before), element, changed) + before + fill + (after + fill if changed else b"")


def spoiled(case: Any, values: tuple[float, ...], random: np.random.Generator) -> Any:
    """The case with one in 50 of its floats (at least one of each array) replaced by one of these values."""
    for x in case[0]:
        if isinstance(x, np.ndarray) and x.dtype in ("f4", BFLOAT16):
            where = random.random(x.shape) < 0.02
            where.flat[random.integers(x.size)] = True
            x[where] = random.choice(values, int(where.sum())).astype(x.dtype)
    return case


def functions() -> str:
    """The C functions for `replay.c`: FUNCTION(name, parameters, arguments taken from a[])."""
    types = {"n": "int64_t", "i": "int", "f": "float", "p": "void *"}
    constants = ("ARENA", "ARENA_BYTES", "LABEL_BYTES", "MAX_ARGUMENTS", "POISON")
    lines = [f"#define {name} {globals()[name]:#x}" for name in constants] + ["#define FUNCTIONS \\"]
    for name, letters in sorted(library.SIGNATURES.items()):
        parameters = ", ".join(types[letter] for letter in letters)
        arguments = ", ".join(f"a[{i}].{letter}" for i, letter in enumerate(letters))
        lines.append(f"    FUNCTION({name}, ({parameters}), ({arguments})) \\")
    return "\n".join(lines) + "\n\n"


def record_cases(name: str, makers: Any, random: np.random.Generator, recorder: Recorder, arena: Arena) -> list[bytes]:
    """The calls of every case of a registered kernel, as test_kernels.py makes them and spoiled.

    The largest size is for products, and once for every other kernel, as are all but the smallest sizes of bf16 and its
    spoiled cases: the text is one, and an emulated PC takes minutes.
    """
    calls, of_bf16 = [], name.endswith(test_kernels.OF_BF16)
    for number, make in enumerate(makers):
        sizes = test_kernels.sizes_of(name)
        if number > 0 and (of_bf16 or name not in ("matmul.add", "linear.forward")):
            sizes = sizes[: 2 if of_bf16 else -1]
        for size in sizes:
            calls += record(name, make(size), f"{name}[{number}]{size}", recorder, arena)
        for kind, values in EXTREMES.items() if number == 0 or not of_bf16 else ():
            case = spoiled(make((49, 33)), values, random)
            calls += record(name, case, f"{name}[{number}](49, 33) {kind}", recorder, arena)
    return calls


def main(folder: Path) -> None:
    level = "avx2" if library.runs("avx2") else choice.select().first.level
    if level == "off" or (level == "base" and platform.machine() == "x86_64"):
        sys.exit("this CPU runs no level with a fused multiply-add: there is nothing to compare with")
    arena, random = Arena(), np.random.default_rng(test_kernels.SEED)
    recorder = Recorder(choice.select(level).first.library, arena)
    calls = []
    with np.errstate(all="ignore"):
        for name, (makers, _) in test_kernels.CASES.items():
            calls += record_cases(name, makers, random, recorder, arena)
    ours = {name for name in library.SIGNATURES if "_work" not in name}
    if missing := ours - recorder.seen:
        sys.exit(f"no case of tests/serial/test_kernels.py reaches {', '.join(sorted(missing))}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "functions.h").write_text(functions())
    data = b"".join(calls)
    data = HEAD.pack(len(calls), HEAD.size + len(data)) + data
    if len(data) > MOST_BYTES:
        sys.exit(f"{len(data)} bytes of calls, of which an emulated PC takes {MOST_BYTES}: make cases smaller")
    (folder / "calls.bin").write_bytes(data + bytes(-len(data) % SECTOR))
    print(f"recorded at level {level}: {len(calls)} calls of {', '.join(sorted(recorder.seen))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
