"""What the benchmarks share: workers that measure on request, the machine's description, recorded results.

Two variants are compared by *pairs*: the parent asks one worker, then the other, and so on, so that whatever
else the machine does hits both alike. A worker waits for its turn in a read and takes no time from the other.
"""

import argparse
import datetime
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import threadpoolctl

from mlm_mpi import mpiexec
from mlm_mpi.comm.group import Group
from mlm_mpi.launcher import START_S

HERE = Path(__file__).parent
PEER_PYTHON = "/tmp/torchenv/bin/python"

SIZES: dict[str, dict[str, Any]] = {
    "small": {"layers": 2, "width": 128, "heads": 4, "context": 128, "vocabulary": 2048, "rows": 8},
    "reference": {"layers": 6, "width": 384, "heads": 6, "context": 256, "vocabulary": 8192, "rows": 8},
    "medium": {"layers": 8, "width": 512, "heads": 8, "context": 512, "vocabulary": 16384, "rows": 4},
    "gpt2-124m": {"layers": 12, "width": 768, "heads": 12, "context": 512, "vocabulary": 50257, "rows": 4},
}


class Worker:
    """A process, or one job of several ranks, that answers a line of JSON with a line of JSON."""

    def __init__(self, command: list[str], threads: int, environment: dict[str, str] | None = None) -> None:
        environment = dict(environment or os.environ)
        environment |= {"OPENBLAS_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        self.hello = self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"the worker {self._process.args!r} ended with exit code {self._process.wait()}")

    def close(self) -> None:
        """Ends the worker, by an empty line: mpiexec does not pass the end of its input on to rank 0."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.close()
        self._process.wait()


def start_ranks(script: str, job: dict[str, Any], ranks: int, threads: int) -> Worker:
    """`script --worker job` on that many ranks, bound as `mlm-mpi run` binds them; one rank needs no MPI."""
    program = [sys.executable, str(HERE / script), "--worker", json.dumps(job)]
    if ranks == 1:
        return Worker(program, threads)
    path = mpiexec.find()
    flavour = mpiexec.vendor(mpiexec.version_text(path))
    options = mpiexec.options(flavour, ranks, [], None)
    environment = mpiexec.environment(flavour, ranks, START_S)
    return Worker([path, "-n", str(ranks), *options, *program], threads, environment)


def serve(group: Group, answer: Callable[..., dict[str, Any]], hello: dict[str, Any]) -> None:
    """A worker's side: every rank runs `answer(**request)`; rank 0 reads requests and writes its answers."""

    def write(value: dict[str, Any]) -> None:
        if group.rank == 0:
            print(json.dumps(value), flush=True)

    write(hello)
    while line := _next_request(group):
        write(answer(**json.loads(line)))


def _next_request(group: Group) -> str:
    """The line rank 0 reads; the others look for it 50 times a second, so that they take no time from their peers."""
    if group.rank == 0:
        line = sys.stdin.readline().strip()
        for rank in range(1, group.size):
            group.comm.send(line, rank)
        return line
    while not group.comm.iprobe(0):
        time.sleep(0.02)
    return group.comm.recv(source=0)


def peak_flops(dtype: str = "float32", seconds: float = 0.5) -> float:
    """Best rate of a square matrix product in this process, now."""
    best = 0.0
    for n in (1024, 2048):
        a, b, c = (np.ones((n, n), dtype) for _ in range(3))
        stop = time.perf_counter() + seconds / 2
        while time.perf_counter() < stop:
            start = time.perf_counter()
            np.matmul(a, b, out=c)
            best = max(best, 2.0 * n**3 / (time.perf_counter() - start))
    return best


def peak_bytes() -> int:
    """Most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def page_faults() -> int:
    """Page faults of this process that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def pair_ratio(a: list[float], b: list[float]) -> float:
    """Median over pairs of b / a."""
    return statistics.median(y / x for x, y in zip(a, b, strict=True))


def machine() -> list[str]:
    """Lines that name hardware and versions."""
    blas = ", ".join(
        f"{i['internal_api']} {i['version']} {i.get('architecture', '')}".strip()
        for i in threadpoolctl.threadpool_info() if i["user_api"] == "blas"
    )  # fmt: skip
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    return [
        f"- {cpu_model()}, {mpiexec.cores()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, "
        f"{platform.system()} {platform.release()}, load {os.getloadavg()[0]:.2f} at the start",
        f"- Python {platform.python_version()}, NumPy {np.__version__}, {blas}, commit {commit}",
    ]


def cpu_model() -> str:
    """The processor's name, with family and model where the name is vague."""
    text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    found = {
        key: re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE) for key in ("model name", "cpu family", "model")
    }
    name, family, model = (m[1].strip() if m else "?" for m in found.values())
    return f"{name} (family {family}, model {model})"


def cpu_has(flag: str) -> bool:
    """Whether Linux names this feature of the processor, for example avx512_bf16."""
    return flag in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()


class Report:
    """Prints lines and, with --record, writes them to benchmarks/results/<theme>_<hardware>_<date>.md."""

    def __init__(self, theme: str, title: str, args: argparse.Namespace) -> None:
        self._theme, self._record = theme, args.record
        command = " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        self._lines = [f"# {title}", "", *machine(), f"- `{command}`", ""]
        print("\n".join(self._lines))

    def say(self, line: str = "") -> None:
        """One line."""
        self._lines.append(line)
        print(line, flush=True)

    def head(self, *names: str) -> None:
        """The head of a table."""
        self.row(*names)
        self.row(*["---:"] * len(names))

    def row(self, *cells: object) -> None:
        """A row of a table."""
        self.say("| " + " | ".join(map(str, cells)) + " |")

    def save(self) -> None:
        """Writes what there is so far, if it was asked for."""
        if self._record:
            hardware = re.sub(r"[^a-z0-9]+", "-", cpu_model().split("(family")[0].lower()).strip("-")
            date = datetime.date.today().isoformat()
            path = HERE / "results" / f"{self._theme}_{hardware}-{mpiexec.cores()}c_{date}.md"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(self._lines) + "\n", encoding="utf-8")
            print(f"recorded in {path}", flush=True)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="turns of each variant")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads per rank")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/…")
    parser.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)
    return parser
