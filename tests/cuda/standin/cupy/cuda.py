"""`cupy.cuda` of the stand-in: one device of capability 9.0 with 4 multiprocessors."""

import os

MULTIPROCESSORS = 4  # few, so that persistent kernels go round more than once


class MemoryPointer:
    def __init__(self, ptr):
        self.ptr = ptr


class Device:
    def __init__(self, number=0):
        self.id = number or 0

    compute_capability = os.environ.get("MLM_MPI_STANDIN_CAPABILITY", "90")
    attributes = {"MultiProcessorCount": MULTIPROCESSORS}

    def use(self):
        pass

    def synchronize(self):
        pass


class runtime:
    class CUDARuntimeError(RuntimeError):
        pass

    @staticmethod
    def getDeviceCount():
        return 1
