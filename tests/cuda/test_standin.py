"""The stand-in for CuPy refuses what CuPy refuses, and what a GPU would answer with rubbish."""

import cupy
import numpy as np
import pytest
from agreement import device
from conftest import ON_GPU
from probes import probe

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_no_implicit_conversion_to_numpy():
    x = device(X)
    with pytest.raises(TypeError):
        np.asarray(x)
    with pytest.raises(TypeError):
        np.add(x, X)
    assert isinstance(x.get(), np.ndarray)
    np.testing.assert_array_equal(cupy.asnumpy(x), X)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + X,
        lambda x: X + x,
        lambda x: x.__iadd__(X),
        lambda x: cupy.add(x, X),
        lambda x: cupy.concatenate([x, X]),
        lambda x: x.__setitem__(0, X[0]),
        lambda x: np.copyto(X.copy(), x),
    ],
)
def test_numpy_arrays_do_not_mix(mixed):
    with pytest.raises((TypeError, ValueError, AttributeError)):  # CuPy 14.2 has one of each
        mixed(device(X))


def test_scalars_mix():
    x = device(X)
    np.testing.assert_array_equal((x + np.float32(1) - 1).get(), X)
    assert (x * np.float32(2)).dtype == np.float32


def test_views_share_memory():
    x = device(X)
    x[1] = 7
    x[:, 0] += 1
    x.T[2] = 9
    np.testing.assert_array_equal(x.get(), [[1, 1, 9], [8, 7, 9]])
    x.reshape(-1)[0] = 5
    assert float(x[0, 0]) == 5


def test_set_wants_the_same_shape_and_dtype():
    x = device(X)
    with pytest.raises((TypeError, ValueError)):
        x.set(X.astype("f8"))
    with pytest.raises((TypeError, ValueError)):
        x.set(X[0])


standin_only = pytest.mark.skipif(ON_GPU, reason="of the stand-in's own making")


@standin_only
def test_what_is_not_there_is_missing():
    with pytest.raises(AttributeError):
        cupy.linalg  # noqa: B018


@standin_only
def test_memory_is_nan_until_written():
    assert np.isnan(cupy.empty((3, 2), np.float32).get()).all()
    assert np.isnan(cupy.empty_like(device(X)).get()).all()


@standin_only
def test_layouts_are_kept():
    assert cupy.empty_like(device(X).T).strides == device(X).T.strides
    assert (device(X).T + 1).strides == (X.T + 1).strides


@standin_only
@pytest.mark.parametrize("argument", [1, 1.0, True, X])
def test_kernels_take_numpy_scalars_only(gpu, argument):
    run = probe(gpu, "hopper", "exp2_probe")
    x = device(X)
    with pytest.raises(TypeError):
        run((1,), (32,), (x, x, argument))


@standin_only
@pytest.mark.parametrize("arguments", [(np.int64(6),), (np.int32(6), np.int32(6))])
def test_kernels_get_arguments_of_the_declared_sizes(gpu, arguments):
    run = probe(gpu, "hopper", "exp2_probe")
    x = device(X)
    with pytest.raises(TypeError):
        run((1,), (32,), (x, x, *arguments))


@standin_only
def test_shared_memory_must_be_asked_for(gpu):
    run = probe(gpu, "hopper", "exp2_probe")
    x = device(X)
    with pytest.raises(RuntimeError, match="not asked for"):
        run((1,), (32,), (x, x, np.int32(6)), shared_mem=49 << 10)
