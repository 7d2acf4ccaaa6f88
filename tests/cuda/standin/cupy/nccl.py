"""`cupy.cuda.nccl` of the stand-in: sums by MPI, at once."""

import ctypes

import numpy as np

available = True
NCCL_SUM, NCCL_FLOAT32, NCCL_FLOAT64 = 0, 7, 8


def get_unique_id():
    return tuple(range(128))


class NcclCommunicator:
    def __init__(self, size, identity, rank):
        assert identity == get_unique_id(), "rank 0's identity has to reach every rank"
        from mpi4py import MPI

        self.comm = MPI.COMM_WORLD.Dup()

    def allReduce(self, source, target, count, kind, operation, stream):
        dtype = {NCCL_FLOAT32: np.float32, NCCL_FLOAT64: np.float64}[kind]
        memory = ctypes.c_char * (count * np.dtype(dtype).itemsize)
        send = np.frombuffer(memory.from_address(source), dtype).copy()
        self.comm.Allreduce(send, np.frombuffer(memory.from_address(target), dtype))
