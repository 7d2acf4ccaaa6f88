"""A stand-in for CuPy on a machine without a GPU: arrays are NumPy's inside, kernels run on the CPU's emulator.

It is strict where CuPy is: an array of the "device" never turns into a NumPy array by itself, and NumPy
refuses to compute with one. Only what the package uses exists; anything else is an AttributeError.
Arrays lie in memory that notices who leaves it (memory.py).
"""

import operator

import numpy as np

from . import cuda, graph, memory
from .emulated import RawModule, load_driver, seed

__all__ = ["RawModule", "cuda", "ndarray", "seed"]
__version__ = "stand-in"


class ndarray:
    """An array in "device memory"."""

    __array_ufunc__ = None  # NumPy arrays refuse to meet one in an expression

    def __init__(self, host):
        self._host = memory.resident(host)

    # what stays the same in both worlds
    shape = property(lambda self: self._host.shape)
    strides = property(lambda self: self._host.strides)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    flags = property(lambda self: self._host.flags)
    T = property(lambda self: ndarray(self._host.T))

    @property
    def data(self):
        return cuda.MemoryPointer(self._host.ctypes.data)

    @property
    def __cuda_array_interface__(self):
        return self._host.__array_interface__ | {"version": 3, "stream": None}

    def __len__(self):
        return len(self._host)

    def __array__(self, *arguments, **named):
        raise TypeError("Implicit conversion to a NumPy array is not allowed: use .get()")

    def __getitem__(self, index):
        return _made(lambda: self._host[unwrap(index)])

    def __setitem__(self, index, value):
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError("a NumPy array cannot be assigned to device memory: use .set()")
        graph.change(lambda: operator.setitem(self._host, unwrap(index), unwrap(value)))

    def get(self, stream=None, out=None, blocking=True):
        graph.forbid_waiting()
        if out is None:
            return self._host.copy()
        stream = stream or cuda.get_current_stream()
        stream.later(lambda: np.copyto(out, self._host))
        if blocking:
            stream.synchronize()
        return out

    def set(self, host, stream=None):
        graph.forbid_waiting()
        if not isinstance(host, np.ndarray) or host.dtype != self.dtype or host.shape != self.shape:
            raise TypeError("set() needs a NumPy array of the same dtype and shape")
        (stream or cuda.get_current_stream()).later(lambda: np.copyto(self._host, host))

    def __float__(self):
        graph.forbid_waiting()
        return float(self._host)

    def __int__(self):
        graph.forbid_waiting()
        return int(self._host)

    def __bool__(self):
        graph.forbid_waiting()
        return bool(self._host)


def wrap(value):
    if isinstance(value, (np.ndarray, np.generic)):
        return ndarray(np.asarray(value))
    return tuple(map(wrap, value)) if isinstance(value, tuple) else value


def unwrap(value):
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, (tuple, list)):
        return type(value)(map(unwrap, value))
    return value


def _made(compute):
    """The arrays that `compute` gives; a graph under capture computes them into the same memory in every replay."""
    result = wrap(compute())
    graph.again(lambda: _refresh(result, wrap(compute())))
    return result


def _refresh(old, new):
    if isinstance(old, ndarray):
        np.copyto(old._host, new._host)


def _checked(values):
    for value in values:
        if isinstance(value, np.ndarray) and value.ndim:
            raise TypeError(f"Unsupported type {type(value)}")
        if isinstance(value, (list, tuple)):
            _checked(value)


def _call(function, arguments, named):
    """function(...), or with `out` a change of it."""

    def compute():
        return function(*map(unwrap, arguments), **{key: unwrap(value) for key, value in named.items()})

    if "out" not in named and function is not np.copyto and function.__name__ != "fill":
        return _made(compute)
    graph.change(compute)
    return named.get("out")


def _method(name):
    def call(self, *arguments, **named):
        _checked(arguments)
        return _call(getattr(self._host, name), arguments, named)

    return call


for _name in (
    "reshape", "transpose", "swapaxes", "astype", "sum", "max", "min", "mean", "copy", "ravel", "view", "any", "all",
    "argmax", "fill",
):  # fmt: skip
    setattr(ndarray, _name, _method(_name))


def _binary(function, swapped):
    def call(self, other):
        _checked([other])
        left, right = (other, self) if swapped else (self, other)
        return _made(lambda: function(unwrap(left), unwrap(right)))

    return call


def _unary(function):
    return lambda self: _made(lambda: function(self._host))


def _in_place(function):
    def call(self, other):
        _checked([other])
        graph.change(lambda: function(self._host, unwrap(other)))
        return self

    return call


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow", "and_", "or_", "xor", "mod", "floordiv"):
    _function, _slot = getattr(operator, _name), _name.strip("_")
    setattr(ndarray, f"__{_slot}__", _binary(_function, False))
    setattr(ndarray, f"__r{_slot}__", _binary(_function, True))
    setattr(ndarray, f"__i{_slot}__", _in_place(getattr(operator, f"i{_slot}")))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(ndarray, f"__{_name}__", _binary(getattr(operator, _name), False))
ndarray.__hash__ = None
for _name in ("neg", "invert"):
    setattr(ndarray, f"__{_name}__", _unary(getattr(operator, _name)))


def asarray(value, dtype=None):
    return value if isinstance(value, ndarray) and dtype in (None, value.dtype) else array(value, dtype)


def array(value, dtype=None):
    return ndarray(np.array(unwrap(value), dtype))


def empty(shape, dtype=float):
    return ndarray(memory.empty(shape, dtype))


def empty_like(prototype, dtype=None):
    return ndarray(memory.empty_like(unwrap(prototype), dtype))


def asnumpy(value):
    return value.get() if isinstance(value, ndarray) else np.asarray(value)


def _function(name):
    def call(*arguments, **named):
        _checked(arguments)
        if name in WAITING:
            graph.forbid_waiting()
        return _call(getattr(np, name), arguments, named)

    call.__name__ = name
    return call


for _name in (
    "zeros", "zeros_like", "ones", "full", "arange", "exp", "log", "tanh", "sqrt", "add",
    "sign", "subtract", "multiply", "matmul", "einsum", "tril", "triu", "isfinite", "argsort", "flatnonzero",
    "concatenate", "stack", "divide", "maximum", "square", "copyto", "where", "ascontiguousarray",
):  # fmt: skip
    globals()[_name] = _function(_name)


def split(value, sections, axis=0):
    """Views of equal parts."""
    if value.shape[axis] % sections:
        raise ValueError("array split does not result in an equal division")
    length, before = value.shape[axis] // sections, (slice(None),) * axis
    return [value[(*before, slice(i * length, (i + 1) * length))] for i in range(sections)]


inf = np.inf
WAITING = ("argsort", "flatnonzero")  # CuPy's wait for the device in between


_pool = cuda.MemoryPool()


def get_default_memory_pool():
    return _pool


driver = load_driver()
