"""Worker processes of `gpu_check.py`, and how it outlives them."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = ROOT / "build" / "gpu-check"  # logs and compiled kernels
sys.path.insert(0, str(ROOT))  # a checkout that is not installed

START_S = 90.0  # a worker imports CuPy and PyTorch, from a disk that may be cold
SILENCE_S = 45.0  # who says nothing for so long hangs; a row compiles a few kernels
SKIPPED = "failed before"  # what a worker says of a variant that it was told to leave out


def kill(process: subprocess.Popen[bytes]) -> None:
    """With all it started. One whose kernel never ends may take long to die: nobody waits for that."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5.0)


class Worker:
    """A process that writes lines of JSON, and answers them; its other output goes to a log."""

    def __init__(
        self, script: str, job: Any, log: Path, environment: dict[str, str], prefix: list[str] | None = None
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        command = [*(prefix or []), sys.executable, str(HERE / script), json.dumps(job)]
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._log.open("ab", buffering=0) as log:
            for line in self._process.stdout:
                try:
                    self._lines.put(dict(json.loads(line)))
                except (ValueError, TypeError):  # somebody else's words
                    log.write(line)
        self._lines.put(None)

    def line(self, seconds: float) -> dict[str, Any] | None:
        """The next line; None where it has ended, or says nothing for so long."""
        try:
            return self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """Sends a request and waits for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.line(seconds)

    def end(self, patience_s: float = 0.2) -> int | None:
        """Its exit code; None where it had to be killed, with all it started."""
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(timeout=patience_s)
        kill(self._process)
        return code

    def last_words(self, lines: int = 3) -> str:
        """The end of its log."""
        text = self._log.read_text(errors="replace").strip().splitlines()
        return " / ".join(line.strip() for line in text[-lines:])[-400:]


class Drive:
    """Workers over rows of the table of kernels until all are done.

    A variant that kills its worker, or hangs, is left out by the next one. `rows`: number -> what a worker found;
    `dead`: "row variant" -> how its worker ended; `pending`: rows not reached, None where no worker ever started.
    """

    def __init__(
        self,
        environment: Callable[..., dict[str, str]],
        job: dict[str, Any],
        name: str,
        prefix: list[str] | None = None,
    ) -> None:
        self.job, self.prefix = job, prefix
        self.log, self.cache = WORK / "logs" / f"{name}.log", WORK / "cache" / name
        self._environment = environment(CUPY_CACHE_DIR=str(self.cache))
        self.rows: dict[int, dict[str, Any]] = {}
        self.dead: dict[str, str] = {}
        self.pending: list[int] | None = None
        self.without_case: list[str] = []
        self.codes: list[int | None] = []
        self.words, self.architecture = "", ""

    def run(self, until: float) -> "Drive":
        """Until all rows are done, time is over, or a worker gets nowhere."""
        progress: Any = None
        while self.pending != [] and time.monotonic() < until:
            before, progress = progress, (len(self.rows), len(self.dead), self.pending)
            if progress == before:
                break
            self._one_worker(until)
        return self

    def _one_worker(self, until: float) -> None:
        skip = [*self.job.get("skip", []), *self.dead]
        job = self.job | {"rows": self.pending, "skip": skip}
        worker = Worker("gpu_kernels.py", job, self.log, self._environment, self.prefix)
        slower = 4 if self.prefix else 1  # under a sanitizer
        current, broken, patience = "", "", START_S * slower
        while line := worker.line(min(patience, until - time.monotonic())):
            patience = SILENCE_S * slower
            if "rows" in line:
                self.pending, self.without_case = line["rows"], line["without_case"]
                self.architecture = line["architecture"]
            elif "begin" in line:
                current = f"{line['row']} {line['begin']}"
            elif "broken" in line:
                broken = line["broken"]
            elif "case" in line:
                self.rows[line["row"]] = line
                self.pending = [row for row in self.pending or [] if row != line["row"]]
                current = ""
        over = time.monotonic() >= until
        if self.pending and not current:
            current, self.pending = f"{self.pending[0]} arguments", self.pending[1:]
        code = worker.end(10.0 if self.prefix and self.pending == [] else 0.2)  # a sanitizer sums up at its end
        self.codes.append(code)
        self.words = worker.last_words()
        if current and not over:
            self.dead[current] = broken or ("hung, was killed" if code is None else f"exit code {code}: {self.words}")


def watched(
    command: list[str], log: Path, environment: dict[str, str], until: float, started: bytes
) -> tuple[int | None, str]:
    """(exit code, output) of a process; the code is None where it was killed: silent for too long, or time over.

    `started`: what it writes when its imports are behind it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    size, spoke, patience = 0, time.monotonic(), START_S
    while process.poll() is None:
        now = time.monotonic()
        if log.stat().st_size != size:
            size, spoke = log.stat().st_size, now
            patience = SILENCE_S if started in log.read_bytes() else START_S
        if now > until or now - spoke > patience:
            kill(process)
            return None, log.read_text(errors="replace")
        time.sleep(0.1)
    return process.returncode, log.read_text(errors="replace")
