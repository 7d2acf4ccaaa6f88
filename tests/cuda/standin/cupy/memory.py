"""Device memory that notices who leaves it: an array ends at a page that may not be touched, with canaries around.

A read or write behind it is a fault, which the emulator reports with the thread that made it; a write into the
canaries (fewer than 16 bytes behind the array, fewer than a page before it) is seen after the launch.
Memory is NaN until somebody writes it.
"""

import ctypes
import math
import mmap
import weakref

import numpy as np

from . import graph

PAGE = mmap.PAGESIZE
ALIGNMENT = 16  # CuPy's is 512: what a kernel needs beyond 16 bytes it must check
CANARY = b"\xa5"

_live = weakref.WeakValueDictionary()  # address of an array -> its memory
_mprotect = ctypes.CDLL(None, use_errno=True).mprotect


class Memory(mmap.mmap):
    """`size` bytes, from `address` on, between canaries between forbidden pages."""

    def __new__(cls, size):
        room = -(-size // ALIGNMENT) * ALIGNMENT
        middle = -(-room // PAGE) * PAGE
        self = super().__new__(cls, -1, middle + 2 * PAGE)
        first = np.frombuffer(self, np.uint8).ctypes.data
        self.size, self.start = size, PAGE + middle - room
        self.address = first + self.start
        self.before = slice(PAGE, self.start)
        self.behind = slice(self.start + size, PAGE + middle)
        self[PAGE : PAGE + middle] = CANARY * middle
        self[self.start : self.behind.start] = b"\xff" * size
        for page in (first, first + PAGE + middle):
            if _mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        _live[self.address] = self
        return self

    def damage(self):
        """Where a canary is gone, or ""."""
        for name, zone in (("before", self.before), ("behind", self.behind)):
            if self[zone] != CANARY * (zone.stop - zone.start):
                return f"a write {name} the {self.size} bytes at {self.address:#x}"
        return ""


def damage():
    """What was written outside of every array, or ""."""
    return next(filter(None, (memory.damage() for memory in list(_live.values()))), "")


def nearest(address):
    """Where an address lies, seen from the array nearest to it."""
    if not _live:
        return "there are no arrays"
    near = min(_live.values(), key=lambda memory: max(memory.address - address, address - memory.address - memory.size))
    return f"{address - near.address} bytes from the start of an array of {near.size} bytes"


def empty(shape, dtype=np.float64, strides=None):
    """A NumPy array in device memory of its own."""
    shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    dtype = np.dtype(dtype)
    memory = Memory(math.prod(shape) * dtype.itemsize)
    graph.hold(memory)
    return np.ndarray(shape, dtype, buffer=memory, offset=memory.start, strides=strides)


def empty_like(array, dtype=None):
    """Its memory in the order of the array's, without its gaps."""
    layout = np.empty_like(array, dtype)
    return empty(layout.shape, layout.dtype, layout.strides)


def resident(array):
    """The array itself if it is a view of device memory, else a copy there."""
    owner = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, Memory):
        return array
    copy = empty_like(array)
    copy[...] = array
    return copy
