"""Whole training steps of a GPT through the CUDA kernels equal NumPy's in float64; a kernel serves every op."""

from types import SimpleNamespace

import cupy
import numpy as np
import pytest
from whole import Whole

from mlm_mpi.backend import choice, registry
from mlm_mpi.backend.arrays import BFLOAT16, cpu, to_host
from mlm_mpi.backend.arrays import gpu as gpu_place
from mlm_mpi.comm.mesh import Mesh
from mlm_mpi.layers.base import Context
from mlm_mpi.optim import Shared, adamw, lion, muon
from mlm_mpi.params.clip import clip_factor, norm
from mlm_mpi.params.layout import Layout
from mlm_mpi.params.store import FlatStore, Parameter

VOCABULARY = 129
REFERENCES = {"sgd", "lstm", "gru", "polar"}  # ops that CuPy computes
HEAD = 64  # what the bf16 attention kernels are made for


def model(dropout=0.0):
    sizes = {"layers": 2, "width": 2 * HEAD, "heads": 2, "context": 48, "feed_forward": 4 * 2 * HEAD}
    return SimpleNamespace(**sizes, dropout=dropout, init_std=0.02, norm_epsilon=1e-5)


def step(place, dtype, rng, dropout=0.0, updates=2):
    """(losses, norms, gradients of the first update, weights after the last), two micro-batches an update."""
    optim = SimpleNamespace(name="adamw", beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, clip=0.5)
    whole = Whole(model(dropout), VOCABULARY, dtype, place)
    store, gradient = whole.store, whole.gradient
    store.initialise(7)
    optimizer = adamw.build(optim, store, Mesh())
    losses, norms, first = [], [], None
    for number in range(updates):
        for micro_batch in range(2):
            ids = rng.integers(0, VOCABULARY, (3, 49)).astype(np.int32)
            mask = rng.random((3, 48)) < 0.9
            ctx = Context(Mesh(), 1, number, micro_batch, True, accumulate=micro_batch > 0)
            inputs = map(place.put, (np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]), mask))
            losses.append(float(whole.loss_and_grad(*inputs, ctx)))
        first = first or {name: to_host(view).copy() for name, view in store.named(gradient).items()}
        length, broken = norm(store, gradient)
        assert broken is None
        norms.append(length)
        targets = 3 * 48
        optimizer.step(gradient, 1e-2, clip_factor(0.5, length / targets) / targets, number + 1)
    return losses, norms, first, {name: to_host(view) for name, view in store.named(store.data).items()}


# relative errors of losses, norms, each parameter's gradient, and of its weights after two updates: Adam divides a
# gradient by its own size, so that rounding to bfloat16 decides the sign of a small one's update
BOUNDS = {"float32": (1e-5, 1e-5, 1e-4, 1e-3), "bf16": (1e-3, 1e-2, 3e-2, None)}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("products", ["float32", "bf16"])
def test_step_equals_numpy(gpu, products, dropout):
    place = gpu_place(np.float32, products, 0)
    assert place.compute == (BFLOAT16 if products == "bf16" else np.float32)
    losses, norms, gradients, weights = step(place, np.float32, np.random.default_rng(3), dropout)
    served, fallen = registry.serving(), registry.fallbacks()
    choice.select("off")
    exact = step(cpu("f8"), "f8", np.random.default_rng(3), dropout)
    of_loss, of_norm, of_gradient, of_weights = BOUNDS[products]
    assert losses == pytest.approx(exact[0], rel=of_loss)
    assert norms == pytest.approx(exact[1], rel=of_norm)
    errors = {name: error(gradients[name], value) for name, value in exact[2].items()}
    assert max(errors.values()) < of_gradient, errors
    if of_weights is not None:
        errors = {name: error(weights[name], value) for name, value in exact[3].items()}
        assert max(errors.values()) < of_weights, errors
    assert not fallen
    assert all(by.startswith("CUDA kernel") for op, by in served.items() if op not in REFERENCES), served


@pytest.mark.parametrize("kind", [lion, muon])
def test_other_optimisers_equal_numpy(gpu, kind):
    """In float64 on the CPU; Muon's products are those of our kernels."""
    found = updated(kind, gpu_place(np.float32, "float32", 0), "f4")
    assert not registry.fallbacks()
    assert error(found, updated(kind, cpu("f8"), "f8")) < 1e-5


def updated(kind, place, dtype):
    """Weights after two updates: matrices of all sorts, one with a single row, and a vector."""
    shapes = {"wide": (6, 20), "tall": (20, 6), "square": (33, 33), "row": (1, 9), "gain": (5,)}
    parameters = [
        Parameter(name, Layout(shape), 1.0, decay=True, matrices=() if len(shape) == 2 else None)
        for name, shape in shapes.items()
    ]
    store = FlatStore([parameters], Mesh(), dtype, place)
    store.initialise(1)
    optimizer = kind.build(kind.Settings(learning_rate=0.1), store, Mesh())
    for number in (1, 2):
        gradient = place.put(np.random.default_rng(number).standard_normal(store.size).astype(dtype))
        if isinstance(optimizer, Shared):
            optimizer.prepare(gradient, 0.1, 0.5, number)
        optimizer.step(gradient, 0.1, 0.5, number)
    return to_host(store.data)


def error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_step_has_the_same_bits_in_any_order_of_threads(gpu):
    bits = set()
    for order in range(3):
        if hasattr(cupy, "seed"):
            cupy.seed(order)
        *_, weights = step(gpu_place(np.float32, "bf16", 0), np.float32, np.random.default_rng(3), updates=1)
        bits.add(b"".join(value.tobytes() for value in weights.values()))
    assert len(bits) == 1
