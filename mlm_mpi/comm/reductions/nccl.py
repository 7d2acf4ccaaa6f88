"""All-reduce between GPUs by NVIDIA's library, with its order of summation."""

from mlm_mpi.backend.arrays import nccl
from mlm_mpi.comm.buckets import Bucket, OneBuffer, Reduction, Setup

DEVICE = "gpu"  # what backend.device has to be


def build(setup: Setup) -> Reduction:
    return Nccl(setup)


class Nccl(OneBuffer):
    """ncclAllReduce per bucket between GPUs, in place, on a stream of its own. MPI only introduces the ranks."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.nccl = nccl()
        self.stream = self.xp.cuda.Stream(non_blocking=True)
        mine = list(self.nccl.get_unique_id()) if self.group.rank == 0 else None  # bytes, which JSON has not
        identity = bytes(self.group.broadcast(mine, "the introduction of NCCL"))
        self.comm = self.nccl.NcclCommunicator(self.group.size, identity, self.group.rank)

    def _start(self, bucket: Bucket) -> None:
        cuda, view = self.xp.cuda, self.buffer[bucket.start : bucket.stop]
        computed = cuda.Event(disable_timing=True)
        computed.record()
        self.stream.wait_event(computed)
        kind = {4: self.nccl.NCCL_FLOAT32, 8: self.nccl.NCCL_FLOAT64}[self.dtype.itemsize]
        self.comm.allReduce(view.data.ptr, view.data.ptr, view.size, kind, self.nccl.NCCL_SUM, self.stream.ptr)
        summed = cuda.Event(disable_timing=True)
        summed.record(self.stream)
        bucket.left = lambda: bool(summed.done)

    def _advance(self, bucket: Bucket) -> list[int] | None:
        return None if bucket.left() else []
