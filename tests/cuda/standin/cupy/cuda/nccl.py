"""`cupy.cuda.nccl` of the stand-in: sums by MPI, at once.

As in CuPy 14.2 (tried with its wheel) `cupy.cuda` does not import it, an id is bytes and nothing like bytes, an
address is an int and no NumPy integer, and without libnccl (MLM_MPI_STANDIN_NCCL=0) it warns and is not `available`.
"""

import ctypes
import os
import warnings

import numpy as np

available = os.environ.get("MLM_MPI_STANDIN_NCCL") != "0"
if not available:
    warnings.warn("\nnccl library could not be loaded.\n\nYou can install the library by:\n  $ pip …", stacklevel=1)

NCCL_SUM, NCCL_FLOAT32, NCCL_FLOAT64 = 0, 7, 8
ID_BYTES = 128


def get_unique_id():
    return os.urandom(ID_BYTES)


class NcclCommunicator:
    def __init__(self, size, identity, rank):
        if type(identity) is not bytes:
            kind = type(identity).__name__
            raise TypeError(f"Argument 'commId' has incorrect type (expected bytes, got {kind})")
        if len(identity) != ID_BYTES:
            raise ValueError(f"commId length {len(identity)} != {ID_BYTES}.")
        self.comm = None
        if size > 1:
            self._meet(size, identity, rank)

    def _meet(self, size, identity, rank):
        from mpi4py import MPI

        self.comm = MPI.COMM_WORLD.Dup()
        assert (size, rank) == (self.comm.size, self.comm.rank)
        seen = bytearray(size * ID_BYTES)
        self.comm.Allgather(identity, seen)
        assert seen == identity * size, "rank 0's id has to reach every rank: NCCL waits for ever"

    def allReduce(self, source, target, count, kind, operation, stream):
        if not all(isinstance(address, int) for address in (source, target, stream)):
            raise TypeError("an integer is required")
        dtype = {NCCL_FLOAT32: np.float32, NCCL_FLOAT64: np.float64}[kind]
        memory = ctypes.c_char * (count * np.dtype(dtype).itemsize)
        send = np.frombuffer(memory.from_address(source), dtype).copy()
        receive = np.frombuffer(memory.from_address(target), dtype)
        if self.comm is None:
            receive[:] = send
        else:
            self.comm.Allreduce(send, receive)
