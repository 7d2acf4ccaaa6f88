"""Which kernel serves each op: tables of hand-written kernels, and the choice in force.

A function in `ops/` is the reference: NumPy or CuPy, any dtype, any strides. Decorated with `@served` it is
preferred by a kernel of its name ("gelu.forward") where the kernel's *contract* holds for the arguments at
hand: device, dtype, contiguity of every array, bounds. Where none holds the reference runs, and that is
counted (`fallbacks`) and shown (`serving`, in `doctor` and at the start of a run).

No device is known here. `choice.py` puts providers of kernels in force (`use`); until it does, references run.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mlm_mpi.errors import ConfigError

OPS = (
    "matmul", "linear", "layernorm", "rmsnorm", "gelu", "relu2", "swiglu", "rotary", "attention", "lstm",
    "gru", "embedding", "crossentropy", "dropout", "sums", "cast", "clip", "polar", "adamw", "sgd",
)  # fmt: skip

Function = TypeVar("Function", bound=Callable[..., Any])
Contract = Callable[..., str]


def _nothing(library: Any) -> str:
    return ""


@dataclass(frozen=True)
class Kernel:
    """One way to compute a function.

    `contract(*arguments)`: why it does not fit, "" if it does. `launch(library, *arguments)` runs it. `variant`: which
    of several kernels of one table for one function. `lacks(library)`: what this machine lacks for it, or "".
    """

    contract: Contract
    launch: Callable[..., Any]
    variant: str = ""
    lacks: Callable[[Any], str] = _nothing


class Table(dict[str, list[Kernel]]):
    """function ("op.direction") -> its kernels, the preferred one first."""

    def kernel(
        self, function: str, contract: Contract, variant: str = "", lacks: Callable[[Any], str] = _nothing
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Enters the decorated launch, behind the kernels of that function entered before."""

        def enter(launch: Callable[..., Any]) -> Callable[..., Any]:
            self.setdefault(function, []).append(Kernel(contract, launch, variant, lacks))
            return launch

        return enter

    def entries(self) -> dict[str, Kernel]:
        """function, or function/variant, -> kernel."""
        return {_label(function, kernel): kernel for function, kernels in self.items() for kernel in kernels}


def _label(function: str, kernel: Kernel) -> str:
    return f"{function}/{kernel.variant}".rstrip("/")


@dataclass(frozen=True)
class Provider:
    """The kernels of a device, and what they are launched with."""

    name: str  # "C": how `serving` calls its kernels
    module: str  # "NumPy": what the references compute with on that device
    kernels: Table
    library: Any = None  # None where no kernel can run, and `lacks` says why
    lacks: str = ""
    level: str = "off"
    products: str = ""  # how matrix products differ from float32 ones of `level`
    rounding: str = ""  # what decides the bits of its kernels beside their text


_NOBODY = Provider("", "NumPy", Table(), lacks="nobody has chosen kernels")


@dataclass
class Choice:
    """The providers in force: the device's first, which alone is counted, then those for arrays that lie elsewhere.

    Beside a GPU's kernels the CPU's serve gradients on their way.
    """

    providers: tuple[Provider, ...] = (_NOBODY,)
    reference: frozenset[str] = frozenset()
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)  # (name/variant, reason) -> times
    fallen: Counter[tuple[str, str]] = field(default_factory=Counter)  # (name, last reason) -> times the reference ran
    _candidates: dict[str, list[tuple[Provider, Kernel]]] = field(default_factory=dict)

    @property
    def first(self) -> Provider:
        return self.providers[0]

    def candidates(self, function: str) -> list[tuple[Provider, Kernel]]:
        """The kernels that may serve a function on this machine, the preferred one first."""
        if function not in self._candidates:
            providers = () if self.refuses(function) else self.providers
            self._candidates[function] = [
                (provider, kernel)
                for provider in providers if provider.library is not None
                for kernel in provider.kernels.get(function, ()) if not kernel.lacks(provider.library)
            ]  # fmt: skip
        return self._candidates[function]

    def refuses(self, function: str) -> str:
        """Why the reference serves this function whatever its arguments; "" if a kernel may."""
        op = function.partition(".")[0]
        if op in self.reference or "all" in self.reference:
            return "numerics.reference asks for it"
        return self.first.lacks


_choice = Choice()


def use(*providers: Provider, reference: Iterable[str] = ()) -> Choice:
    """Puts providers in force, the preferred one first, for all ops but those that the reference shall compute.

    `reference`: ops, or "all". Raises ConfigError where one is unknown: the choice before stands.
    """
    global _choice
    ops = frozenset(reference)
    if unknown := sorted(ops - {"all", *OPS}):
        raise ConfigError(f"numerics.reference names {unknown[0]!r}: choose among {', '.join(OPS)}, all")
    _choice = Choice(providers or (_NOBODY,), ops)
    return _choice


def in_force() -> Choice:
    """What `use` made last."""
    return _choice


def served(reference: Function) -> Function:
    """Lets a kernel run in place of the decorated reference, which stays as `__wrapped__`."""
    name = f"{reference.__module__.rpartition('.')[2]}.{reference.__name__}"

    @functools.wraps(reference)
    def run(*arguments: Any, **named: Any) -> Any:
        choice, why = _choice, ""
        for provider, kernel in choice.candidates(name):
            reason = kernel.contract(*arguments, **named)
            if not reason:
                return kernel.launch(provider.library, *arguments, **named)
            if provider is choice.first:
                why = reason
                choice.refused[_label(name, kernel), reason] += 1
        if why:
            choice.fallen[name, why] += 1
        return reference(*arguments, **named)

    return run  # type: ignore[return-value]


def fallbacks() -> dict[str, int]:
    """How often the reference ran because no kernel's contract held, by "gelu.forward: not contiguous"."""
    return _by_text(_choice.fallen)


def refusals() -> dict[str, int]:
    """How often a kernel's contract did not hold and the next one was asked, by "matmul.add/hopper: K is odd"."""
    return _by_text(_choice.refused)


def _by_text(counted: Counter[tuple[str, str]]) -> dict[str, int]:
    return {f"{name}: {reason}": times for (name, reason), times in sorted(counted.items())}


def serving(dtype: str = "float32") -> dict[str, str]:
    """op -> the implementation that runs and why, for `doctor`, the start table and the fingerprint."""
    first = _choice.first

    def of(op: str) -> str:
        functions = sorted(name for name in first.kernels if name.partition(".")[0] == op)
        why = _choice.refuses(op) if functions or first is _NOBODY else "no kernel"
        if not why and dtype != "float32":
            why = dtype
        if why:
            return f"reference ({first.module}): {why}"
        kernels = (kernel for name in functions for provider, kernel in _choice.candidates(name) if provider is first)
        variants = dict.fromkeys(kernel.variant for kernel in kernels)
        products = first.products if op in ("matmul", "linear") else ""
        shown = ", ".join(filter(None, [*variants, first.level, products]))
        return f"{first.name} kernel ({shown})"

    return {op: of(op) for op in OPS}


def summary(dtype: str = "float32") -> str:
    """`serving` in one line, ops that have no kernel left out: "C kernel (avx2)"."""
    served_by: dict[str, list[str]] = {}
    for op, by in serving(dtype).items():
        if not by.endswith("no kernel"):
            served_by.setdefault(by, []).append(op)
    ranked = sorted(served_by.items(), key=lambda pair: -len(pair[1]))
    return "; ".join(by if number == 0 else f"{by}: {', '.join(ops)}" for number, (by, ops) in enumerate(ranked))
