"""What each kernel's contract refuses: the reference runs instead, or the caller is told."""

import cupy
import ml_dtypes
import numpy as np
import pytest
from agreement import device

from mlm_mpi.backend.cuda.provider import KERNELS
from mlm_mpi.ops.dropout import Draw
from mlm_mpi.rng import key_of

DRAW = Draw(0.3, key_of(1, "test"), 2, 3)


def matrix(dtype="f4"):
    return device(np.ones((6, 8), dtype))


def vector(dtype="f4", size=8):
    return device(np.zeros(size, dtype))


def gates():
    return device(np.ones((6, 2, 8), "f4"))


def heads():
    return device(np.ones((2, 3, 2, 2, 8), "f4"))


def turns():
    return [device(np.ones((3, 2), "f4")) for _ in range(2)]


# name -> arguments that fit
FITTING = {
    "gelu.forward": lambda: [matrix()],
    "gelu.backward": lambda: [matrix(), matrix(), matrix()],
    "dropout.forward": lambda: [matrix(), DRAW, matrix()],
    "dropout.mask": lambda: [DRAW, (3, 4), 5, "f4", cupy],
    "linear.bias_gradient": lambda: [matrix(), vector(), False],
    "layernorm.forward": lambda: [matrix(), vector(), vector(), 1e-5],
    "layernorm.backward": lambda: [
        matrix(), matrix(), vector(), device(np.ones((2, 6), "f4")), vector(), vector(), True, matrix(),
    ],
    "relu2.forward": lambda: [matrix()],
    "relu2.backward": lambda: [matrix(), matrix(), matrix()],
    "swiglu.forward": lambda: [gates()],
    "swiglu.backward": lambda: [matrix(), gates(), gates()],
    "rmsnorm.forward": lambda: [matrix(), vector(), 1e-5],
    "rmsnorm.backward": lambda: [matrix(), matrix(), vector(), vector(size=6), vector(), True, matrix()],
    "rotary.forward": lambda: [heads(), *turns(), device(np.ones((2, 8), "f4")), 1e-5],
    "rotary.backward": lambda: [
        heads(), heads(), *turns(), device(np.ones((2, 8), "f4")), device(np.ones((2, 3, 2, 2), "f4")),
        device(np.ones((2, 8), "f4")), True, 3, 2, heads(),
    ],
    "crossentropy.rows": lambda: [matrix(), vector("i4", 6), vector("?", 6), True],
    "embedding.forward": lambda: [vector("i4", 6), matrix()],
    "embedding.backward": lambda: [matrix(), vector("i4", 6), matrix()],
    "adamw.update": lambda: [*[vector() for _ in range(4)], *[0.5] * 7, vector(ml_dtypes.bfloat16)],
    "clip.squares": lambda: [vector(), 4],
    "sums.tree": lambda: [[vector(), vector()], [0, 1], vector()],
    "cast.to": lambda: [vector(), vector(ml_dtypes.bfloat16)],
}  # fmt: skip
MODULES = ("mlm_mpi.backend.cuda.elementwise", "mlm_mpi.backend.cuda.rows")
NAMES = {name for name, entry in KERNELS.entries().items() if entry.launch.__module__ in MODULES}


def strided(x):
    return device(np.repeat(x.get(), 2, axis=-1))[..., ::2]


def transposed(x):
    return device(x.get().T).T if x.ndim == 2 else strided(x)


def other_type(x):
    return device(x.get().astype("f8" if x.dtype.kind in "fV" else "i8"))


def other_shape(x):
    return device(np.ones(tuple(n + 1 for n in x.shape), x.dtype))


def on_host(x):
    return x.get()


def places(arguments):
    """(position, position inside a list or None) of every array."""
    for i, value in enumerate(arguments):
        if isinstance(value, list) and isinstance(value[0], cupy.ndarray):
            yield from ((i, k) for k in range(len(value)))
        elif isinstance(value, cupy.ndarray):
            yield i, None


def test_every_entry_has_arguments():
    assert set(FITTING) == NAMES


@pytest.mark.parametrize("name", FITTING)
def test_what_fits_is_taken(name):
    assert KERNELS.entries()[name].contract(*FITTING[name]()) == ""


@pytest.mark.parametrize("change", [strided, transposed, other_type, other_shape, on_host])
@pytest.mark.parametrize("name", FITTING)
def test_what_does_not_fit_is_refused(name, change):
    contract = KERNELS.entries()[name].contract
    alone = ("gelu.forward", "relu2.forward", "clip.squares", "embedding.forward")  # any shape fits
    if change is other_shape and name in alone:
        return
    for i, inner in places(FITTING[name]()):
        arguments = FITTING[name]()
        if inner is None:
            arguments[i] = change(arguments[i])
        else:
            arguments[i][inner] = change(arguments[i][inner])
        if name == "crossentropy.rows" and i == 0 and change is other_shape:
            arguments[0] = arguments[0][:, :8]  # 7 rows, padded: the targets are too few
        assert contract(*arguments), f"argument {i}"


@pytest.mark.parametrize("name", ["linear.bias_gradient", "layernorm.backward", "rmsnorm.backward"])
def test_rows_of_no_whole_pieces_are_refused(name):
    contract = KERNELS.entries()[name].contract
    assert contract(*FITTING[name](), pieces=3) == ""
    assert "pieces" in contract(*FITTING[name](), pieces=4) and "pieces" in contract(*FITTING[name](), pieces=0)


def test_strided_squares():
    contract = KERNELS.entries()["clip.squares"].contract
    assert contract(matrix()[:, 2:5], 4) == ""
    assert contract(matrix()[:, ::2], 4) and contract(transposed(matrix()), 4) and contract(matrix("f8")[:, :4], 4)


def test_masks_for_the_cpu_are_refused():
    contract = KERNELS.entries()["dropout.mask"].contract
    assert contract(DRAW, (3, 4), 0, "f4") and contract(DRAW, (3, 4), 0, "f8", cupy)
