"""`cupy.cuda` of the stand-in: GPUs of capability 9.0; streams that work as late as they may.

Work on the current stream happens at once. A copy on another stream happens only when somebody has asked
several times whether it is done, or waits for it: whoever reads too early reads old numbers.
"""

import contextlib
import os
import time

import numpy as np

from .. import graph

PATIENCE = 2  # how often an event says "not yet" before its work happens


class MemoryPointer:
    def __init__(self, ptr):
        self.ptr = ptr


class Device:
    used = 0

    def __init__(self, number=None):
        self.id = Device.used if number is None else number

    compute_capability = os.environ.get("MLM_MPI_STANDIN_CAPABILITY", "90")
    multiprocessors = int(os.environ.get("MLM_MPI_STANDIN_PROCESSORS", "4"))  # few: persistent kernels go round

    @property
    def attributes(self):
        return {"MultiProcessorCount": self.multiprocessors}

    mem_info = (1 << 30, 1 << 30)

    def use(self):
        Device.used = self.id

    def synchronize(self):
        pass


class Stream:
    def __init__(self, non_blocking=False):
        self.queue = []
        self.ptr = id(self)

    def later(self, work):
        self.queue.append(work)

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        pass

    def begin_capture(self, mode=None):
        graph.begin()

    def end_capture(self):
        return graph.end()

    def wait_event(self, event):
        self.later(event.synchronize)

    def synchronize(self):
        while self.queue:
            self.queue.pop(0)()


class _Current(Stream):
    def later(self, work):
        work()


_current = _Current()


def get_current_stream():
    return _current


class Event:
    def __init__(self, disable_timing=False):
        self.stream, self.asked = _current, 0

    def record(self, stream=None):
        self.stream, self.asked, self.seconds = stream or _current, 0, time.perf_counter()

    @property
    def done(self):
        self.asked += 1
        if self.asked > PATIENCE:
            self.synchronize()
        return self.asked > PATIENCE

    def synchronize(self):
        self.asked = PATIENCE + 1
        self.stream.synchronize()


def set_allocator(allocator):
    pass


def get_elapsed_time(start, stop):
    return 1e3 * (stop.seconds - start.seconds)


class MemoryPool:
    def malloc(self, size):
        raise RuntimeError("the stand-in's arrays do not ask a pool for memory")

    def set_limit(self, size=None):
        self.limit = size

    def total_bytes(self):
        return 0

    def free_all_blocks(self):
        pass


@contextlib.contextmanager
def using_allocator(allocator):
    yield


def alloc_pinned_memory(size):
    return memoryview(np.full(size, 0xFF, np.uint8))  # NaN, so that what nobody wrote is seen


class runtime:
    class CUDARuntimeError(RuntimeError):
        pass

    @staticmethod
    def getDeviceCount():
        count = int(os.environ.get("MLM_MPI_STANDIN_GPUS", "1"))
        if not count:
            raise runtime.CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return count

    @staticmethod
    def runtimeGetVersion():
        return 13000

    @staticmethod
    def driverGetVersion():
        return 13000

    @staticmethod
    def getDeviceProperties(number):
        facts = {"name": b"stand-in", "totalGlobalMem": 2**30, "multiProcessorCount": Device.multiprocessors}
        return facts | {"major": int(Device.compute_capability[:-1]), "minor": int(Device.compute_capability[-1])}


class nvrtc:
    @staticmethod
    def getVersion():
        if not (version := os.environ.get("MLM_MPI_STANDIN_NVRTC", "13.0")):
            raise RuntimeError('Failure finding "libnvrtc.so.13": No such file: libnvrtc.so.13')
        return tuple(map(int, version.split(".")))
