"""Everything that needs a GPU, in one command on a bare machine: facts, tests, sanitizers, kernels, a training step.

    python3 benchmarks/gpu_check.py                      # or: make gpu-check
    python3 benchmarks/gpu_check.py --stages d,e --only attention
    PYTHONPATH=tests/cuda/standin python3 benchmarks/gpu_check.py --dry      # on the emulator; figures mean nothing

Runs from the checkout with what the machine has: CuPy, and PyTorch as a peer where it is there. It imports neither:
every stage is worker processes with a limit, so that a kernel that hangs or crashes costs its own row and no other. The
report is written after every stage, to benchmarks/results/gpu_<device>_<date>.md and .json and into $GPU_CHECK_OUT.
Ends with exit code 1 if anything failed.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gpu_workers import HERE, ROOT, SKIPPED, WORK, Drive, Worker, watched

TOTAL_S, QUICK_S = 520.0, 300.0  # all stages together
# seconds a stage may take; b, c and a first, untimed pass of d run side by side
LIMITS = {"facts": 120.0, "correctness": 190.0, "kernels": 150.0, "step": 170.0}
FOUND_ERRORS = 7  # exit code of compute-sanitizer where it found any
COMPILE_S = 110.0  # for torch.compile; then PyTorch runs eagerly
PARTS = 4  # workers of the untimed pass
TEST_WORKERS = 4
NOISE = 0.98  # two timings of the same kernel differ by less
WITHOUT_GPU = {"test_gpu_check", "test_harness", "test_nvrtc", "test_sanitizers"}  # about the emulator and the compiler

# dense bfloat16 TFLOP/s of NVIDIA's data sheets, by a part of the device's name, the longest first
PEAKS = {
    "H100 80GB HBM3": 989, "H100 SXM": 989, "H100 NVL": 835, "H100 PCIe": 756, "GH200": 989, "H200": 989,
    "A100": 312, "B200": 2250, "L40S": 362,
}  # fmt: skip

GPT2 = {
    "layers": 12, "width": 768, "heads": 12, "context": 1024, "feed_forward": 3072, "dropout": 0.0, "init_std": 0.02,
    "norm_epsilon": 1e-5,
}  # fmt: skip
TINY = GPT2 | {"layers": 1, "width": 64, "heads": 1, "context": 32, "feed_forward": 128}


# ---- the report


class Check:
    """What is to be done, what was found, and how much time is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.dry = options, options.dry
        self.began = time.monotonic()
        self.found: dict[str, Any] = {"failures": [], "seconds": {}}
        self._text: list[str] = []
        shutil.rmtree(WORK / "logs", ignore_errors=True)

    # time

    def left(self, stage: str) -> float:
        """Seconds that a stage which begins now may take."""
        return max(1.0, min(LIMITS[stage], self.began + self.options.seconds - time.monotonic()))

    # words

    def say(self, line: str = "") -> None:
        self._text.append(line)
        print(line, flush=True)

    def fail(self, what: str) -> None:
        """Notes a failure; the run goes on."""
        self.found["failures"].append(what)
        self.say(f"* FAILED: {what}")

    def row(self, *cells: object) -> None:
        self.say("| " + " | ".join(map(str, cells)) + " |")

    def head(self, *names: str) -> None:
        self.row(*names)
        self.row(*["---"] * len(names))

    def save(self) -> None:
        """Writes what there is so far."""
        folders = [] if self.dry else [HERE / "results"]
        if os.environ.get("GPU_CHECK_OUT"):
            folders.append(Path(os.environ["GPU_CHECK_OUT"]))
        device = self.found.get("facts", {}).get("versions", {}).get("device", "unknown")
        stem = f"gpu_{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}_{datetime.date.today().isoformat()}"
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{stem}.md").write_text("\n".join(self._text) + "\n", encoding="utf-8")
            (folder / f"{stem}.json").write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    # processes

    def environment(self, **more: str) -> dict[str, str]:
        """Of a worker: the checkout first, after the stand-in where that is asked for."""
        own = {
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(ROOT)])),
            "PYTHONUNBUFFERED": "1",
            "CUPY_CACHE_DIR": str(WORK / "cache" / "kernels"),
            "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"),
        }
        return os.environ | own | more

    def worker(self, script: str, job: Any, log: str) -> Worker:
        """One of the workers beside this file."""
        return Worker(script, job, WORK / "logs" / log, self.environment())

    @property
    def sizes(self) -> str:
        return "small" if self.dry else "full"


# ---- a. facts


def facts(check: Check) -> None:
    """Device, versions, clocks, and the roofs that everything else is compared with."""
    worker = check.worker("gpu_facts.py", check.sizes, "facts.log")
    found = worker.line(check.left("facts"))
    worker.end()
    if found is None:
        return check.fail(f"facts: {worker.last_words()}")
    check.found["facts"] = found
    versions, smi = found["versions"], found["smi"]
    check.say(f"- {versions['device']}, capability {versions['capability']}, {versions['multiprocessors']} processors")
    check.say(f"- {', '.join(f'{key} {value}' for key, value in versions.items() if key != 'device')}")
    check.say(f"- nvidia-smi: {', '.join(f'{key} {value}' for key, value in smi.items()) or 'not there'}")
    check.say(f"- after the roofs: {found['smi_after'].get('clocks.sm', '?')}")
    check.say(f"- copy on the device: {found['copy'] / 1e9:.0f} GB/s, read and written bytes counted")
    for dtype in ("bfloat16", "float32"):
        rates = ", ".join(f"{size}³: {rate / 1e12:.1f} TFLOP/s" for size, rate in found[f"products_{dtype}"].items())
        check.say(f"- {dtype} product by cuBLAS, random numbers: {rates}")


def roofs(check: Check, dtype: str) -> tuple[float, float]:
    """(FLOP/s, bytes/s) that this device reached; infinite where they were not measured."""
    found = check.found.get("facts")
    if not found:
        return float("inf"), float("inf")
    return max(found[f"products_{dtype}"].values()), found["copy"]


# ---- b. tests


def run_tests(check: Check, until: float) -> dict[str, dict[str, list[str]]]:
    """tests/cuda on the GPU, a process a file: file -> outcome -> names."""
    found = (str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(check.options.tests)))
    files = [path for path in found if Path(path).stem not in WITHOUT_GPU]

    def one(path: str) -> dict[str, list[str]]:
        # compiling is one at a time a cache folder
        cache, real = str(WORK / "cache" / Path(path).stem), "0" if check.dry else "1"
        more = {"CUPY_CACHE_DIR": cache, "MLM_MPI_TEST_GPU": real, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        return test_file(path, check.environment(**more), until)

    with ThreadPoolExecutor(TEST_WORKERS) as pool:
        return dict(zip(files, pool.map(one, files), strict=True))


OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
WORST = ("failed", "error", "hung", "not run")


def test_file(path: str, environment: dict[str, str], until: float) -> dict[str, list[str]]:
    """Outcome -> names. A test that says nothing for too long is ended, and the file goes on after it."""
    outcome: dict[str, list[str]] = {key: [] for key in ("passed", "skipped", *WORST)}
    while True:
        seen = [f"--deselect={name}" for names in outcome.values() for name in names]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-v",
            "--tb=short",
            "--color=no",
            "--confcutdir=tests/cuda",
            path,
            *seen,
        ]
        code, text = watched(command, WORK / "logs" / f"{Path(path).stem}.log", environment, until, started=b"::")
        for name, word in OUTCOME.findall(text):
            key = {"XFAIL": "skipped", "XPASS": "passed"}.get(word, word.lower())
            if name not in outcome[key]:
                outcome[key].append(name)
        last = text[text.rfind("\n") + 1 :].strip()  # a test is named before it runs
        if code == 5 and not any(outcome.values()):
            outcome["skipped"].append("the whole file")
        elif code not in (0, 1, 5, None):
            outcome["error"].append(f"pytest ended with {code}: {' '.join(text.split()[-30:])}")
        elif code is None and time.monotonic() >= until:
            outcome["not run"].append(f"from {last or 'the first'} on: no time left")
        elif code is None:
            outcome["hung"].append(last or "before the first test")
            if last:
                continue
        return outcome


def tell_tests(check: Check, outcomes: dict[str, dict[str, list[str]]]) -> None:
    check.say("## Tests on the GPU")
    check.say()
    for path, outcome in outcomes.items():
        check.say(f"- {path}: " + ", ".join(f"{len(names)} {word}" for word, names in outcome.items() if names))
    for path, outcome in outcomes.items():
        for word in WORST:
            if outcome[word]:
                check.fail(f"{path}: {len(outcome[word])} {word}, first: {outcome[word][0]}")
    if not outcomes:
        check.fail(f"no test file matches {check.options.tests}")
    check.say()


# ---- c. sanitizers

# tool -> its options; CuPy tries calls that it expects to fail, which are no errors of kernels
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}


def run_sanitizers(check: Check, until: float) -> dict[str, Drive]:
    """Every kernel at small sizes under each tool of compute-sanitizer; nothing where there is none."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")

    def one(name: str) -> Drive:
        job = kernel_job(check, 0, sizes="small", ours_only=True)
        prefix = [str(tool), "--tool", name, *TOOLS[name], "--error-exitcode", str(FOUND_ERRORS)]
        return Drive(check.environment, job, name, prefix).run(until)

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        return dict(zip(TOOLS, pool.map(one, TOOLS), strict=True)) if tool else {}


def tell_sanitizers(check: Check, drives: dict[str, Drive]) -> None:
    check.say("## compute-sanitizer, small sizes")
    check.say()
    if not drives:
        check.say("There is no compute-sanitizer on this machine: left out.")
    for name, drive in drives.items():
        text = drive.log.read_text(errors="replace")
        summary = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY.*)$", text, re.MULTILINE)
        errors = re.findall(r"^=+ ((?:Invalid|Error|Race|Warning|Program hit).*)$", text, re.MULTILINE)
        check.found.setdefault("sanitizers", {})[name] = {"summary": summary, "errors": errors[:20], "dead": drive.dead}
        said = summary[-1] if summary else "no summary"
        check.say(f"- {name}: {len(drive.rows)} rows, {len(drive.pending or [])} not reached: {said}")
        if FOUND_ERRORS in drive.codes or drive.dead or errors:
            check.fail(f"{name}: {'; '.join(errors[:3]) or drive.dead or said}")
        elif not drive.rows:
            check.fail(f"{name} reached no row: {drive.words}")
    check.say()


# ---- d. kernels


def kernel_job(check: Check, repeats: int, **more: Any) -> dict[str, Any]:
    dtypes = ["bfloat16"] if check.options.quick else ["bfloat16", "float32"]
    return {"sizes": check.sizes, "dtypes": dtypes, "repeats": repeats, "only": check.options.only} | more


def first_pass(check: Check, until: float) -> list[Drive]:
    """Compiles every kernel of the table and compares its result, untimed, by several workers."""

    def one(part: int) -> Drive:
        return Drive(check.environment, kernel_job(check, 0, part=[part, PARTS]), f"pass{part}").run(until)

    with ThreadPoolExecutor(PARTS) as pool:
        drives = list(pool.map(one, range(PARTS)))
    (WORK / "cache" / "kernels").mkdir(parents=True, exist_ok=True)
    for drive in drives:
        for path in drive.cache.glob("*.cubin"):
            shutil.copy2(path, WORK / "cache" / "kernels")
    return drives


def kernel_table(check: Check) -> None:
    """Every kernel of the registry against the device's roof, cuBLAS and PyTorch."""
    repeats = 2 if check.dry else 5 if check.options.quick else 11
    known = check.found.pop("dead", {})
    drive = Drive(check.environment, kernel_job(check, repeats, skip=list(known)), "kernels")
    drive.run(time.monotonic() + check.left("kernels"))
    rows = check.found.pop("first_pass", {}) | drive.rows
    check.found["kernels"] = [rows[number] for number in sorted(rows)]
    check.say("## Kernels")
    check.say()
    check.say(
        "Medians of events around several calls; variants in turn, inputs random and gone through in turn past the"
    )
    check.say("L2 cache. The first of our kernels that takes the arguments is what runs; × is its gain in speed.")
    check.say("cuBLAS is the bare product (torch.mm); torch does all that our function does. The error is the distance")
    check.say("from PyTorch, or from our reference, in float32.")
    check.say()
    check.head(
        "function", "case", "type", "kernel", "µs", "rate", "of roof", "× cuBLAS", "× torch", "error", "others, µs"
    )
    for row in check.found["kernels"]:
        _table_row(check, row)
    check.say()
    faster = sorted(filter(None, map(_faster_by_cublas, check.found["kernels"])))
    check.found["cublas"] = {"architecture": drive.architecture, "faster": faster}  # for backend/cuda/cublas.json
    check.say(f"Bare products that cuBLAS does faster: {', '.join(faster) or 'none'}.")
    _tell_failures(check, drive, known)
    check.say()


def _faster_by_cublas(row: dict[str, Any]) -> str:
    """The case of `backend/cuda/cublas.json` if cuBLAS is faster than all of ours by more than noise, else ""."""
    times = {name: one["us"] for name, one in row["variants"].items() if "us" in one}
    mine = [us for name, us in times.items() if row["variants"][name]["kind"] == "ours" and name != "cublas"]
    return row["cublas_case"] if mine and times.get("cuBLAS", min(mine)) < NOISE * min(mine) else ""


def _tell_failures(check: Check, drive: Drive, known: dict[str, str]) -> None:
    for key, why in (drive.dead | known).items():
        check.fail(f"row {key}: {why}")
    for row in check.found["kernels"]:
        if "failed" in row:
            check.fail(f"{row['function']} {row['case']} {row['dtype']}: {row['failed']}")
        for name, one in row["variants"].items():
            if one.get("failed", SKIPPED) != SKIPPED:
                check.fail(f"{row['function']} {row['case']} {row['dtype']}, {name}: {one['failed']}")
    if drive.pending is None:
        check.fail(f"kernels: no worker started: {drive.words}")
    elif drive.pending:
        check.fail(f"kernels: {len(drive.pending)} rows were not reached in time: {drive.words}")
    if drive.without_case:
        check.fail(f"gpu_cases.py has no case for {', '.join(drive.without_case)}")


def _table_row(check: Check, row: dict[str, Any]) -> None:
    variants = row["variants"]
    timed = {name: one["us"] for name, one in variants.items() if "us" in one}
    name = next((name for name in timed if variants[name].get("kind") == "ours"), None)
    others = [f"{other} {us:.1f}" for other, us in timed.items() if other != name]
    others += [f"{other}: {one['left_out']}" for other, one in variants.items() if "left_out" in one]
    start = row["function"], row["case"], row["dtype"]
    if name is None:
        return check.row(*start, "none", *[""] * 6, "; ".join(others))
    seconds, (flops_roof, bytes_roof) = 1e-6 * timed[name], roofs(check, row["dtype"])
    by_flops = row["flops"] / flops_roof > row["bytes"] / bytes_roof
    rate = row["flops"] / seconds / 1e12 if by_flops else row["bytes"] / seconds / 1e9
    share = rate * (1e12 / flops_roof if by_flops else 1e9 / bytes_roof)
    row |= {"kernel": name, "rate": rate, "bound": "flops" if by_flops else "bytes", "share": share}
    peers = [us for other, us in timed.items() if other.startswith("torch")]
    cublas = f"{timed['cuBLAS'] / timed[name]:.2f}" if "cuBLAS" in timed else ""
    check.row(
        *start, name, f"{timed[name]:.1f}", f"{rate:.1f} {'TFLOP/s' if by_flops else 'GB/s'}", f"{100 * share:.0f} %",
        cublas, f"{min(peers) / timed[name]:.2f}" if peers else "", f"{variants[name].get('error', float('nan')):.0e}",
        "; ".join(others),
    )  # fmt: skip


# ---- e. a training step


def step(check: Check) -> None:
    """GPT-2 124M: ours against PyTorch, in turn, in processes of their own."""
    until = time.monotonic() + check.left("step")
    model, vocabulary = (TINY, 64) if check.dry else (GPT2, 50304)
    check.say("## A training step of GPT-2" + (" 124M" if not check.dry else ""))
    check.say()
    for rows in (2,) if check.dry else (32, 16, 8, 4):
        job = {"model": model, "vocabulary": vocabulary, "rows": rows, "reference": check.options.reference}
        sides = _start_sides(check, job, until)
        if sides is not None:
            break
        check.say(f"- {rows} rows do not fit")
    else:
        return check.fail("a step does not fit into this GPU's memory")
    if not sides:
        return
    pairs = [_turns(check, sides, until)]
    sides.pop("ours").end()
    if graphs := _start_graphs(check, job, until):
        sides = {"ours, graphs": graphs} | sides
        pairs.append(_turns(check, sides, until))
    for worker in sides.values():
        worker.end()
    check.found["step"]["pairs"] = pairs
    _tell_step(check, model, vocabulary, rows)


def _start_sides(check: Check, job: dict[str, Any], until: float) -> dict[str, Worker] | None:
    """Both, ready; torch.compile works while ours gets ready. None where one ran out of memory."""
    peer_s = min(COMPILE_S, until - time.monotonic() - 40)
    began = time.monotonic()
    compiled = not (check.options.eager or check.dry)
    peer = check.worker("gpu_step.py", job | {"side": "torch", "compile": compiled}, "step-torch.log")
    mine = check.worker("gpu_step.py", job | {"side": "ours"}, "step-ours.log")
    ready = mine.line(until - time.monotonic())
    if ready is None or "failed" in ready:
        mine.end()
        peer.end()
        if _out_of_memory(ready):
            return None
        check.fail(f"our step: {ready['failed'] if ready else mine.last_words()}")
        return {}
    check.found["step"] = {"rows": job["rows"], "ready": {"ours": ready}}
    name = "torch.compile" if compiled else "torch eager"
    theirs = peer.line(peer_s - (time.monotonic() - began))
    if compiled and (theirs is None or "failed" in theirs):
        peer.end()
        why = theirs["failed"] if theirs else peer.last_words(1)
        check.say(f"- PyTorch runs eagerly: torch.compile was not ready after {time.monotonic() - began:.0f} s: {why}")
        name, peer = "torch eager", check.worker("gpu_step.py", job | {"side": "torch"}, "step-eager.log")
        theirs = peer.line(until - time.monotonic() - 15)
    if theirs is None or "failed" in theirs:
        peer.end()
        if _out_of_memory(theirs):
            mine.end()
            return None
        check.say(f"- PyTorch's step did not run: {theirs['failed'] if theirs else peer.last_words()}")
        return {"ours": mine}
    check.found["step"]["ready"][name] = theirs
    return {"ours": mine, name: peer}


def _out_of_memory(answer: dict[str, Any] | None) -> bool:
    return answer is not None and "OutOfMemory" in answer["failed"]


def _start_graphs(check: Check, job: dict[str, Any], until: float) -> Worker | None:
    """Ours once more, replaying CUDA graphs."""
    worker = check.worker("gpu_step.py", job | {"side": "ours", "graphs": True}, "step-graphs.log")
    ready = worker.line(until - time.monotonic())
    if ready and "failed" not in ready:
        check.found["step"]["ready"]["ours, graphs"] = ready
        return worker
    worker.end()
    check.fail(f"our step by CUDA graphs: {ready['failed'] if ready else worker.last_words()}")
    return None


def _turns(check: Check, sides: dict[str, Worker], until: float) -> dict[str, list[dict[str, Any]]]:
    """Side -> what it says after each of its turns; the sides take turns."""
    turns, steps = (2, 1) if check.dry else (5 if check.options.quick else 7, 5)
    said: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(turns):
        for side in sides if number % 2 == 0 else reversed(sides):
            answer = sides[side].ask({"steps": steps}, until - time.monotonic())
            if answer is None:
                check.fail(f"{side} answered no turn {number}: {sides[side].last_words()}")
                return said
            said[side].append(answer)
    return said


def _tell_step(check: Check, model: dict[str, Any], vocabulary: int, rows: int) -> None:
    from mlm_mpi.layers.base import Sizes
    from mlm_mpi.models import gpt

    found, tokens = check.found["step"], rows * model["context"]
    flops = gpt.flops(SimpleNamespace(**model), Sizes(vocabulary), tokens)
    device = check.found.get("facts", {}).get("versions", {}).get("device", "")
    peak = next((peak for name, peak in PEAKS.items() if name in device), None)
    check.say(
        f"{rows} rows of {model['context']} tokens, vocabulary {vocabulary}; bfloat16 over float32 weights. MFU: 6 FLOP"
    )
    check.say("per weight of a product and token, and attention in full (arXiv:2204.02311, appendix B), over")
    check.say(f"the data sheet's dense bfloat16 peak of {peak or 'this unknown device'} TFLOP/s.")
    check.say()
    check.head("step", "ms", "tokens/s", "MFU", "of cuBLAS's rate", "peak GiB", "ready after s", "losses")
    # PyTorch took turns with each of ours: its first counts
    said_by = {side: said for pair in reversed(found["pairs"]) for side, said in pair.items() if said}
    turns = dict(sorted(said_by.items()))
    found["sides"] = {}
    for side, said in turns.items():
        seconds, ready = statistics.median(turn["seconds"] for turn in said), found["ready"][side]
        rate, losses = flops / seconds, [*ready["losses"], said[-1]["loss"]]
        mfu = rate / (1e12 * peak) if peak else None
        found["sides"][side] = {"step_s": seconds, "tokens_per_s": tokens / seconds, "flops": rate, "mfu": mfu}
        check.row(
            side, f"{1e3 * seconds:.1f}", f"{tokens / seconds:.0f}", f"{100 * mfu:.1f} %" if mfu else "unknown",
            f"{100 * rate / roofs(check, 'bfloat16')[0]:.0f} %", f"{said[-1]['peak_bytes'] / 2**30:.1f}",
            f"{ready['ready_s']:.0f}", ", ".join(f"{loss:.3f}" for loss in losses),
        )  # fmt: skip
    check.say()
    for pair in found["pairs"]:
        if len(pair) == 2 and all(pair.values()):
            (ours, mine), (peer, theirs) = pair.items()
            ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(mine, theirs, strict=False))
            found.setdefault("ratios", {})[ours] = ratio
            check.say(f"{ours} is {ratio:.3f} × as fast as {peer} (median of turns, one after the other).")
    last = turns["ours"][-1] if "ours" in turns else {}
    for key, words in (("fallbacks", "Handed to the reference"), ("refusals", "Handed to the next kernel")):
        if last.get(key):
            check.say(f"{words}: {'; '.join(f'{what} ({times} times)' for what, times in last[key].items())}.")
    check.say()


# ---- all of it


def correctness(check: Check) -> None:
    """Stages b and c and the first pass of d, side by side: they mind each other's load little."""
    until = time.monotonic() + check.left("correctness")
    jobs: dict[str, Callable[[Check, float], Any]] = {"b": run_tests, "c": run_sanitizers, "d": first_pass}
    with ThreadPoolExecutor(len(jobs)) as pool:
        running = {letter: pool.submit(jobs[letter], check, until) for letter in jobs if letter in check.options.stages}
    if "b" in running:
        check.found["tests"] = running["b"].result()
        tell_tests(check, check.found["tests"])
    if "c" in running:
        tell_sanitizers(check, running["c"].result())
    if "d" in running:
        drives = running["d"].result()
        check.found["dead"] = {key: why for drive in drives for key, why in drive.dead.items()}
        check.found["first_pass"] = {number: row for drive in drives for number, row in drive.rows.items()}


def run(check: Check) -> None:
    stages = check.options.stages
    parts = [("facts", "a", facts), ("correctness", "bcd", correctness), ("kernels", "d", kernel_table)]
    for name, letters, stage in [*parts, ("step", "e", step)]:
        if not set(letters) & set(stages):
            continue
        began = time.monotonic()
        try:
            stage(check)
        except Exception as error:  # a stage must not take the others along
            check.fail(f"{name}: {type(error).__name__}: {error}")
        check.found["seconds"][name] = time.monotonic() - began
        check.say(f"({name}: {time.monotonic() - began:.0f} s, {time.monotonic() - check.began:.0f} s so far)")
        check.say()
        check.save()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stages", default="a,b,c,d,e", help="a facts, b tests, c sanitizers, d kernels, e step")
    parser.add_argument("--only", default="", help="rows of c and d whose title has one of these words: attention,gelu")
    parser.add_argument("--quick", action="store_true", help="bfloat16 only, fewer samples")
    parser.add_argument("--eager", action="store_true", help="PyTorch's step without torch.compile")
    parser.add_argument("--reference", default="", help="ops of our step that CuPy computes: gelu,attention or all")
    parser.add_argument("--tests", default="tests/cuda/test_*.py", help="test files of b")
    parser.add_argument("--seconds", type=float, help=f"limit of all stages together, {TOTAL_S:g} or {QUICK_S:g}")
    parser.add_argument("--dry", action="store_true", help="small sizes, nothing recorded: for the emulator")
    options = parser.parse_args()
    options.seconds = options.seconds or (QUICK_S if options.quick else TOTAL_S)
    options.stages = [letter.strip() for letter in options.stages.split(",")]
    options.only = [word.strip() for word in options.only.split(",") if word.strip()]
    if unknown := set(options.stages) - set("abcde"):
        parser.error(f"no stage {', '.join(sorted(unknown))}")
    return options


def commit() -> str:
    """Of the checkout; a copy without its history has none."""
    asked = ["git", "describe", "--always", "--dirty"]
    said = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return said.stdout.strip() if said and said.stdout.strip() else "unknown"


def main() -> int:
    check = Check(arguments())
    check.say(f"# GPU check, {datetime.date.today().isoformat()}, commit {commit()}")
    check.say()
    if check.dry:
        check.say("A dry run at small sizes: no figure below means anything.")
        check.say()
    check.say(f"- `python3 benchmarks/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`")
    run(check)
    failures = check.found["failures"]
    check.say(f"{len(failures)} failures." if failures else "Nothing failed.")
    check.save()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
