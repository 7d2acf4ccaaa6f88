"""Which implementation serves each op: the registry of hand-written kernels, and the choice among them.

A function in `ops/` is the reference: NumPy or CuPy, any dtype, any strides. Decorated with `@served` it is
preferred by a kernel registered under its name ("gelu.forward") where the kernel's *contract* holds for the
arguments at hand: device, dtype, contiguity of every array, bounds. Where it does not hold the reference
runs, and that is counted (`fallbacks`) and shown (`serving`, in `doctor` and at the start of a run).
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mlm_mpi.errors import ConfigError

OPS = (
    "matmul", "linear", "layernorm", "gelu", "attention", "embedding", "crossentropy", "dropout",
    "sums", "clip", "adamw", "sgd",
)  # fmt: skip
LEVELS = ("base", "avx2", "avx512")  # narrow to wide

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kernel:
    """An entry: `contract(*arguments)` is why it does not fit, "" if it does; `launch(library, *arguments)` runs."""

    name: str  # op.direction
    device: str
    dtype: str
    contract: Callable[..., str]
    launch: Callable[..., Any]


@dataclass
class Selection:
    """The choice made at start. `library` is None where no kernel can run, and `reason` says why."""

    level: str = "off"
    library: Any = None
    reason: str = ""
    products: str = ""  # how matrix products differ from float32 ones of `level`
    reference: frozenset[str] = frozenset()
    fallen: Counter[tuple[str, str]] = field(default_factory=Counter)  # (name, reason) -> times

    def refuses(self, name: str) -> str:
        """Why the reference serves this function whatever its arguments; "" if a kernel may."""
        op = name.partition(".")[0]
        if op in self.reference or "all" in self.reference:
            return "numerics.reference asks for it"
        return self.reason if self.library is None else ""


_entries: dict[str, Kernel] = {}
_selection: Selection | None = None


def kernel(name: str, contract: Callable[..., str], device: str = "cpu", dtype: str = "float32") -> Callable[..., Any]:
    """Registers the decorated launch function under `name`."""

    def register(launch: Callable[..., Any]) -> Callable[..., Any]:
        _entries[name] = Kernel(name, device, dtype, contract, launch)
        return launch

    return register


def entries() -> dict[str, Kernel]:
    """name -> entry."""
    from mlm_mpi.backend import cpu  # noqa: F401  registers its kernels

    return _entries


def select(level: str = "auto", reference: str = "", products: str = "float32", threads: int = 1) -> Selection:
    """Chooses the dispatch level ("auto", one of LEVELS, or "off") and the ops that the reference computes.

    `reference`: "gelu,attention" or "all". `products`: "float32", or "bf16" for operands of matrix products rounded
    to bf16; `threads` share one. Raises ConfigError where an op is unknown or this CPU lacks the level or bf16.
    """
    global _selection
    from mlm_mpi.backend import cpu

    ops = frozenset(op.strip() for op in reference.split(",") if op.strip())
    if unknown := sorted(ops - {"all", *OPS}):
        raise ConfigError(f"numerics.reference names {unknown[0]!r}: choose among {', '.join(OPS)}, all")
    chosen, library, reason = cpu.load(level, threads)
    about = cpu.take_bf16(library, chosen) if products == "bf16" else ""
    _selection = Selection(chosen, library, reason, about, ops)
    return _selection


def selection() -> Selection:
    """The choice in force: made by `select`, or "auto" on first use."""
    return _selection or select()


def served(reference: Function) -> Function:
    """Lets a registered kernel run in place of the decorated reference, which stays as `__wrapped__`."""
    name = f"{reference.__module__.rpartition('.')[2]}.{reference.__name__}"

    @functools.wraps(reference)
    def run(*arguments: Any, **named: Any) -> Any:
        chosen = _selection or select()
        if chosen.library is None or chosen.refuses(name):
            return reference(*arguments, **named)
        entry = _entries[name]
        reason = entry.contract(*arguments, **named)
        if reason:
            chosen.fallen[name, reason] += 1
            return reference(*arguments, **named)
        return entry.launch(chosen.library, *arguments, **named)

    return run  # type: ignore[return-value]


def fallbacks() -> dict[str, int]:
    """How often the reference ran because a contract did not hold, by "gelu.forward: not contiguous"."""
    return {f"{name}: {reason}": times for (name, reason), times in sorted(selection().fallen.items())}


def serving(dtype: str = "float32") -> dict[str, str]:
    """op -> the implementation that runs and why, for `doctor`, the start table and the fingerprint."""
    chosen, known = selection(), {name.partition(".")[0] for name in entries()}

    def of(op: str) -> str:
        why = "no kernel" if op not in known else chosen.refuses(op)
        if not why and dtype != "float32":
            why = dtype
        products = f", {chosen.products}" if chosen.products and op in ("matmul", "linear") else ""
        return f"reference (NumPy): {why}" if why else f"C kernel ({chosen.level}{products})"

    return {op: of(op) for op in OPS}


def summary(dtype: str = "float32") -> str:
    """`serving` in one line, ops that have no kernel left out: "C kernel (avx2)"."""
    served_by: dict[str, list[str]] = {}
    for op, by in serving(dtype).items():
        if not by.endswith("no kernel"):
            served_by.setdefault(by, []).append(op)
    most = f"C kernel ({selection().level})"
    return "; ".join(by if by == most else f"{by}: {', '.join(ops)}" for by, ops in served_by.items())
