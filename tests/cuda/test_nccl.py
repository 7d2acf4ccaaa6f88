"""NCCL as CuPy gives it: the types it hands out and takes, and a sum over a single rank, which one GPU can do."""

import cupy
import numpy as np
import pytest

from mlm_mpi.backend import arrays
from mlm_mpi.comm.buckets import Setup
from mlm_mpi.comm.group import Group
from mlm_mpi.comm.reductions.nccl import Nccl
from mlm_mpi.errors import ConfigError

try:
    nccl = arrays.nccl()
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)


def test_an_id_is_128_bytes_and_never_the_same():
    one, other = nccl.get_unique_id(), nccl.get_unique_id()
    assert type(one) is type(other) is bytes
    assert len(one) == len(other) == 128 and one != other


@pytest.mark.parametrize("kind", [tuple, list, bytearray, memoryview])
def test_an_id_of_another_type_is_refused(kind):
    with pytest.raises(TypeError, match=rf"expected bytes, got {kind.__name__}"):
        nccl.NcclCommunicator(1, kind(nccl.get_unique_id()), 0)


@pytest.mark.parametrize("length", [0, 127, 129])
def test_an_id_of_another_length_is_refused(length):
    with pytest.raises(ValueError, match=f"commId length {length} != 128"):
        nccl.NcclCommunicator(1, bytes(length), 0)


@pytest.mark.parametrize("which", [0, 1, 5], ids=["from", "to", "stream"])
def test_an_address_is_a_python_int(which):
    arguments = [1 << 40, 1 << 40, 1, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, 0]
    arguments[which] = np.int64(arguments[which])
    with pytest.raises(TypeError, match="an integer is required"):
        nccl.NcclCommunicator.__new__(nccl.NcclCommunicator).allReduce(*arguments)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("overlap", [True, False])
def test_the_sum_of_one_rank_is_its_own(dtype, overlap):
    place = arrays.gpu(dtype, "float32", 0)
    reduction = Nccl(Setup(Group(), 1, [(0, 1)], [(0, 7), (7, 100)], 256, dtype, overlap, place))
    values = np.arange(100).astype(dtype)
    for _ in range(2):
        reduction.begin()
        buffer, fresh = reduction.open_lane(0)
        assert fresh
        buffer.set(values)
        for block in (1, 0):
            reduction.block_ready(block)
        reduction.close_lane(0)
        assert (cupy.asnumpy(reduction.finish()) == values).all()
