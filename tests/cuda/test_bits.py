"""The bits of a kernel are its own and its arguments': no number of multiprocessors moves them."""

import cupy
import numpy as np
import pytest
from agreement import device
from test_matmul import BF16, F32, run

from mlm_mpi.ops import crossentropy, embedding, layernorm, linear, rmsnorm, rotary
from mlm_mpi.params import clip

PROCESSORS = (1, 16, 108, 132, 148)


def on_gpus(gpu, monkeypatch, work):
    """The bits of what `work()` gives, on GPUs that differ in the number of their multiprocessors."""
    found = set()
    for processors in PROCESSORS:
        monkeypatch.setattr(gpu, "processors", processors)
        monkeypatch.setattr(cupy.cuda.Device, "multiprocessors", processors, raising=False)
        found.add(b"".join(cupy.asnumpy(x).tobytes() for x in work()))
    return found


# few tiles of a long sum, which `plan` cuts; more tiles than some of the GPUs have multiprocessors
SIZES = {"plain": [(9, 16, 4736), (300, 200, 40)], "mma": [(16, 16, 8192), (300, 200, 64)]}
SIZES["hopper"] = [(16, 16, 25088), (300, 520, 128)]


@pytest.mark.parametrize("variant", ["plain", "mma", "hopper"])
@pytest.mark.parametrize("which", [0, 1])
def test_products(gpu, variant, which, monkeypatch, rng):
    m, n, k = SIZES[variant][which]
    dtype = F32 if variant == "plain" else BF16
    a, b = (device(rng.normal(size=shape).astype(dtype)) for shape in ((m, k), (k, n)))

    def work():
        out = device(np.full((m, n), np.nan, "f4"))
        run(gpu, variant, "matmul.add", a, b, out, False)
        return [out]

    assert len(on_gpus(gpu, monkeypatch, work)) == 1


def test_sums_over_rows(gpu, dtype, monkeypatch, rng):
    rows, columns = 600, 40
    dy, x, gain = (
        device(rng.normal(size=shape).astype(dtype)) for shape in ((rows, columns), (rows, columns), columns)
    )
    statistics = device(np.ones((2, rows), "f4"))
    ids = device(rng.integers(0, 9, rows).astype("i4"))
    logits = rng.normal(size=(3, 9000)).astype(dtype)
    heads, weight, none = x.reshape(1, rows, 1, 5, 8), gain[:16].reshape(2, 8), device(np.empty((rows, 0), "f4"))
    inverse = device(np.ones((1, rows, 1, 5), "f4"))

    def work():
        db, dgain, dbias, dtable = (
            device(np.zeros(shape, "f4")) for shape in (columns, columns, columns, (9, columns))
        )
        linear.bias_gradient(dy, db, False)
        dx = layernorm.backward(dy, x, gain, statistics, dgain, dbias, False)
        embedding.backward(dy, ids, dtable)
        losses = crossentropy.rows(device(logits), ids[:3], None, True)
        sums, dweight = device(np.zeros(columns, "f4")), device(np.zeros((2, 8), "f4"))
        rmsnorm.backward(dy, x, gain, statistics[0], sums, False)
        rotary.backward(dy.reshape(heads.shape), heads, none, none, weight, inverse, dweight)
        return [db, dgain, dbias, dx, dtable, losses, clip.squares(dtable, 100), sums, dweight]

    assert len(on_gpus(gpu, monkeypatch, work)) == 1
