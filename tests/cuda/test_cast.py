import ml_dtypes
import numpy as np
import pytest
from agreement import device, run, same_bits, shifted

from mlm_mpi.backend import registry
from mlm_mpi.ops import cast

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 333), (1, 5000)])
@pytest.mark.parametrize("place", [device, shifted])
def test_both_ways(gpu, shape, place, rng):
    x = (rng.normal(size=shape) * 10.0 ** rng.integers(-30, 30, shape)).astype("f4")
    narrow, back = place(np.zeros(shape, BF16)), place(np.zeros(shape, "f4"))
    run(cast.to, place(x), narrow)
    assert same_bits(narrow, device(x.astype(BF16)))
    run(cast.to, narrow, back)
    assert same_bits(back, device(x.astype(BF16).astype("f4")))


def test_ties_infinities_and_what_is_no_number(gpu):
    x = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 1, 0x80000000], "u4").view("f4")
    out = device(np.zeros(8, BF16))
    run(cast.to, device(np.append(x, np.float32(np.nan))), out)
    bits = out.get().view("u2")
    assert bits[:7].tolist() == [0x3F80, 0x3F82, 0x7F80, 0x7F80, 0xFF80, 0, 0x8000] and np.isnan(out.get()[7])


def test_the_same_type_is_left_to_the_reference(gpu, dtype):
    out = device(np.zeros(9, dtype))
    cast.to(device(np.ones(9, dtype)), out)
    assert registry.fallbacks() == {"cast.to: the same type": 1} and (out.get().astype("f4") == 1).all()
