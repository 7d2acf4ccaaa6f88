"""A worker of `gpu_check.py`: compiles, compares and times every variant of every case; writes lines of JSON.

    python benchmarks/gpu_kernels.py '{"sizes": "small", "dtypes": ["float32"], "repeats": 3, "only": ["gelu"]}'

{"row": number, "begin": variant} comes before a variant runs for the first time, so that whoever reads knows which one
never came back; {"row": number, ...} with the numbers ends a row. `rows`: which rows (default: all), `skip`: keys
"row variant" that failed before. `part` [k, of]: rows k, k + of, … With 0 repeats nothing is timed;
`ours_only`: our kernels run once, compared with nothing.
"""

import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a checkout that is not installed

import cupy
import ml_dtypes
import numpy as np
from gpu_cases import FULL, SMALL, Bank, Case, cases
from gpu_clock import LEAD_BYTES, Clock, microseconds
from gpu_workers import SKIPPED

from mlm_mpi.backend import choice
from mlm_mpi.backend.arrays import wide
from mlm_mpi.backend.cuda import matmul as products
from mlm_mpi.backend.cuda.provider import KERNELS

try:
    import torch
    from gpu_peers import peers
except ImportError:
    torch = None

# ‖ours − judge‖ / ‖judge‖ by the type of a result; rounding to bfloat16 alone costs 2e-3
TOLERANCE = {"float32": 1e-4, "float64": 1e-4, "bfloat16": 1e-2}
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


def in_float32(value: Any) -> Any:
    """An argument with bfloat16 arrays made float32."""
    if isinstance(value, list):
        return [in_float32(one) for one in value]
    return wide(value) if isinstance(value, cupy.ndarray) else value


# ---- a row

Prepare = Callable[[tuple[Any, ...]], Callable[[], Any]]  # arguments -> what is timed


@dataclass(frozen=True)
class Variant:
    """One way to compute a function. `kind`: "ours", "reference" or "peer"."""

    name: str
    kind: str
    prepare: Prepare

    def results(self, case: Case, arguments: tuple[Any, ...]) -> list[Any]:
        """Runs it once, waits, and returns device arrays; a peer may have fewer than the function, or none."""
        returned = self.prepare(arguments)()
        cupy.cuda.Device().synchronize()
        if self.kind == "peer":
            return [cupy.asarray(tensor.detach().float().contiguous()) for tensor in returned]
        return [cupy.asarray(array) for array in case.results(arguments, returned)]


def peer_variants(function: str, dtype_name: str) -> list[Variant]:
    """PyTorch's."""
    found = peers(function, dtype_name) if torch else {}
    return [
        Variant(name, "peer", lambda arguments, peer=peer: peer(*map(to_tensor, arguments)))
        for name, peer in found.items()
    ]  # fmt: skip


class Comparison:
    """One row: its variants run once and are compared, then timed. A function's results in float32 are the judge."""

    def __init__(self, number: int, row: Row, gpu: Any, skip: set[str]) -> None:
        self.number, (self.case, self.dtype), self.gpu, self.skip = number, row, gpu, skip
        self.judge, self.wanted = "", list[Any]()
        self.found: dict[str, dict[str, Any]] = {}
        self.working: list[Variant] = []

    def arguments(self, seed: int = SEED) -> tuple[Any, ...]:
        return self.case.make(Bank(cupy, seed))

    def facts(self) -> dict[str, Any]:
        """What is known of this row."""
        case = self.case
        return {
            "case": case.name, "function": case.function, "dtype": self.dtype.name, "flops": case.flops,
            "bytes": case.bytes, "shape": case.shape, "judge": self.judge, "variants": self.found,
            "cublas_case": self._cublas_case(),
        }  # fmt: skip

    def _cublas_case(self) -> str:
        """What `backend/cuda/cublas.json` calls a bare product; "" of anything else."""
        if self.case.function != "matmul.add":
            return ""
        a, b, out, accumulate = self.arguments()
        return "" if accumulate else products.case_of(products.Product("STORE", a, b, out=out))

    def run(self) -> None:
        """All variants once."""
        self._ask_judge()
        self.run_ours()
        for variant in (*peer_variants(self.case.function, self.dtype.name), self._reference()):
            self._try(variant)

    def run_ours(self) -> None:
        """Our kernels once."""
        for kernel in KERNELS[self.case.function]:
            self._offer(kernel)

    def _reference(self) -> Variant:
        return Variant("reference", "reference", lambda arguments: lambda: reference(self.case.function)(*arguments))

    def _offer(self, entry: Any) -> None:
        name = entry.variant or "kernel"
        if lacks := entry.lacks(self.gpu):
            self.found[name] = {"left_out": lacks}
        elif refused := entry.contract(*self.arguments()):
            self.found[name] = {"left_out": f"contract: {refused}"}
        else:
            self._try(Variant(name, "ours", lambda arguments: lambda: entry.launch(self.gpu, *arguments)))

    def _ask_judge(self) -> None:
        arguments = [in_float32(value) for value in self.arguments()]
        for variant in (*peer_variants(self.case.function, "float32"), self._reference()):
            results, _ = self._once(variant, f"judge {variant.name}", tuple(arguments))
            if results:
                self.judge, self.wanted = variant.name, results
                return

    def _once(self, variant: Variant, title: str, arguments: tuple[Any, ...]) -> tuple[list[Any] | None, str]:
        """(results, "") or (None, what went wrong)."""
        if f"{self.number} {title}" in self.skip:
            return None, SKIPPED
        say({"row": self.number, "begin": title})
        try:
            return variant.results(self.case, arguments), ""
        except Exception as error:
            leave_if_broken(error)
            return None, described(error)

    def _try(self, variant: Variant) -> None:
        facts = self.found[variant.name] = {"kind": variant.kind}
        results, wrong = self._once(variant, variant.name, self.arguments())
        if results and self.wanted:
            # PyTorch does not return statistics
            errors = [(distance(a, b), a.dtype.name) for a, b in zip(results, self.wanted, strict=False)]
            facts["error"] = max(error for error, _ in errors)
            if variant.kind != "peer" and not all(error <= TOLERANCE[kind] for error, kind in errors):
                wrong = f"differs from {self.judge} in float32 by {facts['error']:.1e}"
        if wrong:
            facts["left_out" if variant.kind == "peer" else "failed"] = wrong
        else:
            self.working.append(variant)

    def time(self, repeats: int, clock: Clock) -> None:
        """Those that computed the right thing."""
        if f"{self.number} timing" in self.skip:
            return
        say({"row": self.number, "begin": "timing"})
        self.wanted = []
        held = sum(x.nbytes for x in self.arguments() if isinstance(x, cupy.ndarray))
        count = max(1, min(MOST_SETS, -(-DISTINCT_BYTES // max(1, held))))
        sets = [self.arguments(SEED + number) for number in range(count)]
        rarely = [variant.name for variant in self.working if variant.kind == "reference"]
        runs = {
            variant.name: [variant.prepare(arguments) for arguments in (sets[:1] if variant.name in rarely else sets)]
            for variant in self.working
        }
        for name, samples in clock.compare(runs, repeats, rarely).items():
            self.found[name] |= {"us": microseconds(samples), "samples_ms": samples}


def reference(function: str) -> Callable[..., Any]:
    """The reference of a registry's name, in CuPy."""
    stem, _, name = function.partition(".")
    rooms = (f"mlm_mpi.{room}.{stem}" for room in ("ops", "optim", "backend"))
    return getattr(importlib.import_module(next(filter(importlib.util.find_spec, rooms))), name)


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
    if job["ours_only"]:
        cupy.cuda.set_allocator(None)  # every array by itself: a sanitizer does not look inside a pool
    # a reference computes everything itself; kernels are launched by their entries
    gpu = choice.select(reference="all", device="cuda").first.library
    rows, served = table(job["sizes"], job["dtypes"]), set(KERNELS)
    asked = range(len(rows)) if job["rows"] is None else job["rows"]
    chosen = [k for k in asked if not job["only"] or any(word in title(rows[k]) for word in job["only"])]
    chosen = [k for k in chosen if rows[k][0].function in served]
    if job["rows"] is None:
        part, parts = job["part"]
        chosen = chosen[part::parts]
    cased = {case.function for case, _ in table(job["sizes"], ["bfloat16", "float32"])}
    say({"rows": chosen, "without_case": sorted(served - cased), "architecture": gpu.architecture})
    lead = LEAD_BYTES if job["sizes"] == "full" else 1 << 12
    clock = Clock(cupy, lead) if job["repeats"] else None
    for number in chosen:
        row = Comparison(number, rows[number], gpu, set(job["skip"]))
        failed = {}
        try:
            row.run_ours() if job["ours_only"] else row.run()
            if clock:
                row.time(job["repeats"], clock)
        except Exception as error:  # of the case itself, or out of memory
            leave_if_broken(error)
            failed = {"failed": described(error)}
        say({"row": number} | row.facts() | failed)
        del row
        cupy.get_default_memory_pool().free_all_blocks()
        if torch:
            torch.cuda.empty_cache()
    say({"done": True})


if __name__ == "__main__":
    main()
