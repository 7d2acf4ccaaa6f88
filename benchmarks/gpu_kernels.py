"""A worker of `gpu_check.py`: compiles, compares and times every variant of every case; writes lines of JSON.

    python benchmarks/gpu_kernels.py '{"sizes": "small", "dtypes": ["float32"], "repeats": 3, "only": ["gelu"]}'

{"row": number, "begin": variant} comes before a variant runs for the first time, so that whoever reads knows which one
never came back; {"row": number, ...} with the numbers ends a row. `rows`: which rows (default: all), `skip`: keys
"row variant" that failed before. `part` [k, of]: rows k, k + of, … With 0 repeats nothing is timed;
`ours_only`: our kernels run once, compared with nothing.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed

import cupy
import ml_dtypes
import numpy as np
from gpu_cases import FULL, SMALL, Bank, Case, cases
from gpu_clock import LEAD_BYTES, Clock, microseconds

from mlm_mpi.backend import kernels
from mlm_mpi.backend.arrays import wide

try:
    import torch
    from gpu_peers import peers
except ImportError:
    torch = None

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # ‖ours − theirs‖ / ‖theirs‖; both round, and sum in other orders
DISTINCT_BYTES = 128 << 20  # of inputs, gone through in turn: more than any L2 cache
MOST_SETS = 8
SEED = 1

Row = tuple[Case, np.dtype]


def table(sizes: str, dtypes: list[str]) -> list[Row]:
    """Every case in every element type; a row is known by its number."""
    kinds = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
    chosen = {"full": FULL, "small": SMALL}[sizes]
    return [(case, kinds[name]) for name in dtypes for case in cases(chosen, kinds[name])]


def title(row: Row) -> str:
    """What `only` looks into: "bfloat16 gelu.forward 32768x3072"."""
    case, dtype = row
    return f"{dtype.name} {case.function} {case.name}"


# ---- arrays of the two worlds


def to_tensor(value: Any) -> Any:
    """A device array as a tensor that shares its memory; bfloat16 crosses as int16, which every version takes."""
    if isinstance(value, list):
        return [to_tensor(one) for one in value]
    if not isinstance(value, cupy.ndarray):
        return value
    bits = value.view(np.int16) if value.dtype.name == "bfloat16" else value
    tensor = torch.from_dlpack(bits) if torch.cuda.is_available() else torch.from_numpy(bits.get())
    return tensor.view(torch.bfloat16) if value.dtype.name == "bfloat16" else tensor


def distance(found: Any, wanted: Any) -> float:
    """‖found − wanted‖ / ‖wanted‖; not finite where one of them is not."""
    found, wanted = (wide(x).astype(np.float32, copy=False).ravel() for x in (found, wanted))
    if found.shape != wanted.shape:
        return float("inf")
    difference = found - wanted
    return float((difference * difference).sum()) ** 0.5 / max(float((wanted * wanted).sum()) ** 0.5, 1e-30)


# ---- a row


class Comparison:
    """One row: its variants run once and are compared, then timed."""

    def __init__(self, number: int, row: Row, gpu: Any, skip: set[str], ours_only: bool) -> None:
        self.number, (self.case, self.dtype), self.gpu, self.skip = number, row, gpu, skip
        self.ours_only = ours_only
        self.wanted: list[Any] | None = None
        self.judge = ""
        self.variants: dict[str, dict[str, Any]] = {}
        self.working: dict[str, Callable[[tuple[Any, ...]], Callable[[], Any]]] = {}

    def arguments(self, seed: int = SEED) -> tuple[Any, ...]:
        return self.case.make(Bank(cupy, seed))

    def _peer(self, peer: Any) -> Callable[[tuple[Any, ...]], Callable[[], Any]]:
        return lambda arguments: peer(*map(to_tensor, arguments))

    def _entry(self, entry: Any) -> Callable[[tuple[Any, ...]], Callable[[], Any]]:
        return lambda arguments: lambda: entry.launch(self.gpu, *arguments)

    def _reference(self, arguments: tuple[Any, ...]) -> Callable[[], Any]:
        return lambda: reference(self.case.function)(*arguments)

    def run(self, repeats: int, clock: Clock | None) -> dict[str, Any]:
        """Everything about this row."""
        entries = [entry for entry in kernels.entries("cuda").values() if entry.name == self.case.function]
        if self.ours_only:
            for entry in entries:
                self._offer(entry)
            return self.facts()
        for name, peer in (peers(self.case.function, self.dtype.name) if torch else {}).items():
            self._try(name, self._peer(peer), foreign=True)
        if self.wanted is None or not entries:
            self._try("reference", self._reference, judge=True)
        for entry in entries:
            self._offer(entry)
        if "reference" not in self.variants:
            self._try("reference", self._reference)
        if clock and repeats:
            self._time(repeats, clock)
        return self.facts()

    def facts(self) -> dict[str, Any]:
        """What is known of this row."""
        case = self.case
        return {
            "case": case.name, "function": case.function, "dtype": self.dtype.name, "flops": case.flops,
            "bytes": case.bytes, "shape": case.shape, "judge": self.judge, "variants": self.variants,
        }  # fmt: skip

    def _offer(self, entry: Any) -> None:
        name = entry.variant or "kernel"
        if lacks := entry.lacks(self.gpu):
            self.variants[name] = {"left_out": lacks}
        elif refused := entry.contract(*self.arguments()):
            self.variants[name] = {"left_out": f"contract: {refused}"}
        else:
            self._try(name, self._entry(entry), ours=True)

    def _try(self, name: str, prepare: Any, ours: bool = False, foreign: bool = False, judge: bool = False) -> None:
        """Runs a variant once and compares it with the first that had all results."""
        facts = self.variants[name] = {"ours": ours}
        if f"{self.number} {name}" in self.skip:
            facts["failed"] = "failed before"
            return
        say({"row": self.number, "begin": name})
        try:
            arguments = self.arguments()
            returned = prepare(arguments)()
            if foreign:
                results = [cupy.asarray(tensor.detach().float().contiguous()) for tensor in returned]
            else:
                results = self.case.results(arguments, returned)
            cupy.cuda.Device().synchronize()
        except Exception as error:
            facts["failed"] = described(error)
            leave_if_broken(error)
            return
        self.working[name] = prepare
        if not results or self.ours_only:
            return
        if self.wanted is None and (foreign or judge):
            self.wanted, self.judge = [wide(x).astype(np.float32) for x in results], name
            return
        pairs = zip(results, self.wanted or [], strict=False)  # PyTorch does not return statistics
        facts["error"] = max(distance(a, b) for a, b in pairs)
        if not facts["error"] <= TOLERANCE[self.dtype.name]:
            facts["failed"] = f"differs from {self.judge} by {facts['error']:.1e}"

    def _time(self, repeats: int, clock: Clock) -> None:
        self.wanted = None
        held = sum(x.nbytes for x in self.arguments() if isinstance(x, cupy.ndarray))
        count = max(1, min(MOST_SETS, -(-DISTINCT_BYTES // max(1, held))))
        sets = [self.arguments(SEED + number) for number in range(count)]
        timed = {name: prepare for name, prepare in self.working.items() if "failed" not in self.variants[name]}
        runs = {name: [prepare(arguments) for arguments in sets] for name, prepare in timed.items()}
        for name, samples in clock.compare(runs, repeats).items():
            self.variants[name] |= {"us": microseconds(samples), "samples_ms": samples}


def reference(function: str) -> Callable[..., Any]:
    """The reference of a registry's name, in CuPy."""
    import importlib

    stem, _, name = function.partition(".")
    package = "optim" if stem in ("adamw", "clip", "sgd") else "ops"
    return getattr(importlib.import_module(f"mlm_mpi.{package}.{stem}"), name)


def described(error: Exception) -> str:
    """In one line; the whole story goes to the log."""
    print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def leave_if_broken(cause: Exception) -> None:
    """After an illegal access nothing works in this process any more: whoever reads starts another."""
    try:
        cupy.cuda.Device().synchronize()
        cupy.zeros(1, np.float32).get()
    except Exception:
        say({"broken": described(cause)})
        os._exit(3)


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    job = {"sizes": "full", "dtypes": ["bfloat16", "float32"], "repeats": 11, "only": [], "skip": [], "rows": None}
    job |= {"part": [0, 1], "ours_only": False}
    job |= json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    # a reference computes everything itself; kernels are launched by their entries
    kernels.select(reference="all", device="cuda")
    gpu, rows = kernels.selection().library, table(job["sizes"], job["dtypes"])
    served = {entry.name for entry in kernels.entries("cuda").values()}
    asked = range(len(rows)) if job["rows"] is None else job["rows"]
    chosen = [k for k in asked if not job["only"] or any(word in title(rows[k]) for word in job["only"])]
    chosen = [k for k in chosen if rows[k][0].function in served]
    if job["rows"] is None:
        part, parts = job["part"]
        chosen = chosen[part::parts]
    say({"rows": chosen, "without_case": sorted(served - {case.function for case, _ in rows})})
    lead = LEAD_BYTES if job["sizes"] == "full" else 1 << 12
    clock = Clock(cupy, lead) if job["repeats"] else None
    for number in chosen:
        row = Comparison(number, rows[number], gpu, set(job["skip"]), job["ours_only"])
        try:
            facts = row.run(job["repeats"], clock)
        except Exception as error:  # of the case itself, or out of memory
            facts = row.facts() | {"failed": described(error)}
            leave_if_broken(error)
        say({"row": number} | facts)
        cupy.get_default_memory_pool().free_all_blocks()
        if torch:
            torch.cuda.empty_cache()
    say({"done": True})


if __name__ == "__main__":
    main()
