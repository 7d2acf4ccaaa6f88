"""Plain MPI_Iallreduce: the order is the library's, and the bits change with the number of ranks."""

from mlm_mpi.comm.buckets import Bucket, OneBuffer, Reduction, Setup, unfinished


def build(setup: Setup) -> Reduction:
    return Allreduce(setup)


class Allreduce(OneBuffer):
    """MPI_Iallreduce per bucket, in place."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.mirror = self.transport.mirror(self.buffer)

    def _start(self, bucket: Bucket) -> None:
        part = slice(bucket.start, bucket.stop)
        if self.group.size > 1:
            bucket.left = self.transport.leave([(self.buffer[part], self.mirror[part])])

    def _advance(self, bucket: Bucket) -> list[int] | None:
        if bucket.done or self.group.size == 1:
            return None
        part = slice(bucket.start, bucket.stop)
        if not bucket.sent:
            # a collective: every rank has to begin its buckets in the same order
            if not all(other.sent for other in self.buckets[: bucket.number]) or not bucket.left():
                return []
            from mpi4py import MPI

            bucket.sent = True
            mine = self.mirror[part]
            bucket.sends = [self.group.mail.begin(lambda: self.group.comm.Iallreduce(MPI.IN_PLACE, mine), mine)]
        bucket.sends = unfinished(bucket.sends)
        if bucket.sends:
            return []
        self.transport.arrive(self.mirror[part], self.buffer[part])
        bucket.done = True
        return None
