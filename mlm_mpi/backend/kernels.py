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
    "sums", "cast", "clip", "adamw", "sgd",
)  # fmt: skip
LEVELS = ("base", "avx2", "avx512")  # narrow to wide

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kernel:
    """An entry: `contract(*arguments)` is why it does not fit, "" if it does; `launch(library, *arguments)` runs.

    `variant`: which of several kernels for one function. `lacks(library)`: what this machine lacks for it, or "".
    """

    name: str  # op.direction
    device: str
    variant: str
    contract: Callable[..., str]
    launch: Callable[..., Any]
    lacks: Callable[[Any], str] = lambda library: ""


@dataclass
class Selection:
    """The choice made at start. `library` is None where no kernel can run, and `reason` says why."""

    level: str = "off"
    library: Any = None
    reason: str = ""
    products: str = ""  # how matrix products differ from float32 ones of `level`
    reference: frozenset[str] = frozenset()
    device: str = "cpu"
    host: Any = None  # beside a GPU: the library for arrays in the CPU's memory, such as gradients on their way
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)  # (name/variant, reason) -> times
    fallen: Counter[tuple[str, str]] = field(default_factory=Counter)  # (name, last reason) -> times the reference ran
    _candidates: dict[str, list[Kernel]] = field(default_factory=dict)

    def candidates(self, name: str) -> list[Kernel]:
        """The kernels that may serve a function on this machine, the preferred one first."""
        if name not in self._candidates:
            known = [] if self.refuses(name) else _entries.get((self.device, name), [])
            if known and self.host is not None:
                known = known + _entries.get(("cpu", name), [])
            self._candidates[name] = [entry for entry in known if not entry.lacks(self.library_of(entry))]
        return self._candidates[name]

    def library_of(self, entry: Kernel) -> Any:
        """What an entry is launched with."""
        return self.library if entry.device == self.device else self.host

    def refuses(self, name: str) -> str:
        """Why the reference serves this function whatever its arguments; "" if a kernel may."""
        op = name.partition(".")[0]
        if op in self.reference or "all" in self.reference:
            return "numerics.reference asks for it"
        return self.reason if self.library is None else ""


_entries: dict[tuple[str, str], list[Kernel]] = {}  # (device, name) -> kernels, the preferred one first
_selection: Selection | None = None


def kernel(
    name: str,
    contract: Callable[..., str],
    device: str = "cpu",
    variant: str = "",
    lacks: Callable[[Any], str] | None = None,
) -> Callable[..., Any]:
    """Registers the decorated launch function under `name`, behind those registered before it."""

    def register(launch: Callable[..., Any]) -> Callable[..., Any]:
        extra = {} if lacks is None else {"lacks": lacks}
        _entries.setdefault((device, name), []).append(Kernel(name, device, variant, contract, launch, **extra))
        return launch

    return register


def _load_entries(device: str) -> None:
    # importing the module registers its kernels
    if device == "cpu":
        from mlm_mpi.backend import cpu  # noqa: F401
    else:
        from mlm_mpi.backend.cuda import launches  # noqa: F401


def entries(device: str = "cpu") -> dict[str, Kernel]:
    """name, or name/variant, -> entry."""
    _load_entries(device)
    return {
        f"{entry.name}/{entry.variant}".rstrip("/"): entry
        for (where, _), known in _entries.items() if where == device
        for entry in known
    }  # fmt: skip


def select(
    level: str = "auto", reference: str = "", products: str = "float32", threads: int = 1, device: str = "cpu"
) -> Selection:
    """Chooses the dispatch level ("auto", one of LEVELS, or "off") and the ops that the reference computes.

    `reference`: "gelu,attention" or "all". `products`: "float32", or "bf16" for operands of matrix products rounded
    to bf16, where a GPU goes by the arrays' dtype; `threads` share one. `device`: "cpu" or "cuda", which knows no
    level but "off". Raises ConfigError where an op is unknown or this CPU lacks the level or bf16.
    """
    global _selection
    from mlm_mpi.backend import cpu

    ops = frozenset(op.strip() for op in reference.split(",") if op.strip())
    if unknown := sorted(ops - {"all", *OPS}):
        raise ConfigError(f"numerics.reference names {unknown[0]!r}: choose among {', '.join(OPS)}, all")
    _load_entries("cpu")
    _load_entries(device)
    if device == "cpu":
        chosen, library, reason = cpu.load(level, threads)
        about = cpu.take_bf16(library, chosen) if products == "bf16" else ""
        _selection = Selection(chosen, library, reason, about, ops)
    elif level == "off":
        _selection = Selection(reason="kernels are switched off", reference=ops, device=device)
    else:
        from mlm_mpi.backend.cuda.device import Device

        gpu, (_, host, _) = Device(), cpu.load("auto", threads)
        _selection = Selection(gpu.architecture, gpu, reference=ops, device=device, host=host)
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
        why = ""
        for entry in chosen.candidates(name):
            reason = entry.contract(*arguments, **named)
            if not reason:
                return entry.launch(chosen.library_of(entry), *arguments, **named)
            if entry.device == chosen.device:
                why = reason
                chosen.refused[f"{name}/{entry.variant}".rstrip("/"), reason] += 1
        if why:
            chosen.fallen[name, why] += 1
        return reference(*arguments, **named)

    return run  # type: ignore[return-value]


def fallbacks() -> dict[str, int]:
    """How often the reference ran because no kernel's contract held, by "gelu.forward: not contiguous"."""
    return _by_text(selection().fallen)


def refusals() -> dict[str, int]:
    """How often a kernel's contract did not hold and the next one was asked, by "matmul.add/hopper: K is odd"."""
    return _by_text(selection().refused)


def _by_text(counted: Counter[tuple[str, str]]) -> dict[str, int]:
    return {f"{name}: {reason}": times for (name, reason), times in sorted(counted.items())}


def serving(dtype: str = "float32") -> dict[str, str]:
    """op -> the implementation that runs and why, for `doctor`, the start table and the fingerprint."""
    chosen, known = selection(), entries(selection().device)

    def of(op: str) -> str:
        names = sorted({entry.name for entry in known.values() if entry.name.partition(".")[0] == op})
        why = chosen.refuses(op) if names else "no kernel"
        if not why and dtype != "float32":
            why = dtype
        if why:
            return f"reference ({'NumPy' if chosen.device == 'cpu' else 'CuPy'}): {why}"
        served_by = (entry for name in names for entry in chosen.candidates(name) if entry.device == chosen.device)
        variants = dict.fromkeys(entry.variant for entry in served_by)
        products = chosen.products if op in ("matmul", "linear") else ""
        shown = ", ".join(filter(None, [*variants, chosen.level, products]))
        return f"{'C' if chosen.device == 'cpu' else 'CUDA'} kernel ({shown})"

    return {op: of(op) for op in OPS}


def summary(dtype: str = "float32") -> str:
    """`serving` in one line, ops that have no kernel left out: "C kernel (avx2)"."""
    served_by: dict[str, list[str]] = {}
    for op, by in serving(dtype).items():
        if not by.endswith("no kernel"):
            served_by.setdefault(by, []).append(op)
    ranked = sorted(served_by.items(), key=lambda pair: -len(pair[1]))
    return "; ".join(by if number == 0 else f"{by}: {', '.join(ops)}" for number, (by, ops) in enumerate(ranked))
