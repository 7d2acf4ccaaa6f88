"""`mlm-mpi chaos CONFIG`: kills ranks of a real training, again and again, and demands the bits of an undisturbed one.

Every trial draws from the seed what happens to whom, after which step and how long after it, so that the same command
does the same again as far as a machine's clock lets it. A trial has passed when the run has ended with the hash and
the losses of the undisturbed run, every step written down once, no process of it left and no half save in its folder.
"""

import argparse
import contextlib
import hashlib
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from mlm_mpi import config as configuration
from mlm_mpi.comm.launch import ANNOUNCED
from mlm_mpi.errors import ConfigError, MlmError
from mlm_mpi.monitor.live import live
from mlm_mpi.monitor.metrics import read_metrics

_EXAMPLES = """examples:
  mlm-mpi chaos jobs/configs/gpt2-tiny.toml --set train.steps=30 --trials 20
  mlm-mpi chaos jobs/configs/tiny.toml -n 3 --faults kill,stop --seed 7 --out faults.md

Faults: kill (a rank), kill-0 (rank 0), kill-many (several at once, all but one at most), kill-twice (another one within
10 ms), stop (SIGSTOP), kill-all (every rank; started again), kill-launcher (mlm-mpi run; started again)."""
_PATIENCE = 10.0  # times an undisturbed run, and a minute: a trial that lasts longer hangs
_ORPHANS_S = 5.0
_GRACE_S = 70.0  # more than `mlm-mpi run` takes to end a job


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mlm-mpi chaos`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("config", metavar="CONFIG", help="TOML file, for example jobs/configs/gpt2-tiny.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    parser.add_argument("-n", "--ranks", type=int, default=4, metavar="N", help="ranks of each run (default 4)")
    parser.add_argument("--trials", type=int, default=10, metavar="N", help="of each fault (default 10)")
    parser.add_argument("--faults", default=",".join(FAULTS), metavar="NAME,…", help="which (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of what happens when, and to whom")
    parser.add_argument("--out", metavar="FILE", help="also write the table there")


@dataclass(frozen=True)
class Plan:
    """A fault after step `step`, `delay` of a step later, to these ranks."""

    fault: str
    step: int
    delay: float
    victims: tuple[int, ...]


@dataclass
class Outcome:
    """What came of a trial: what is wrong with it, and how long the others needed to go on."""

    plan: Plan
    wrong: str = ""
    again: bool = False  # the run ended, and had to be started again
    went_on_s: list[float] = field(default_factory=list)


def _kill(job: "Job", plan: Plan) -> None:
    job.signal(plan.victims, signal.SIGKILL)


def _kill_twice(job: "Job", plan: Plan) -> None:
    job.signal(plan.victims[:1], signal.SIGKILL)
    time.sleep(0.01 * plan.delay)
    job.signal(plan.victims[1:], signal.SIGKILL)


def _stop(job: "Job", plan: Plan) -> None:
    job.signal(plan.victims, signal.SIGSTOP)


def _kill_launcher(job: "Job", plan: Plan) -> None:
    job.process.kill()


# name -> (what is done, how many ranks it is done to, whether the run has to be started again)
FAULTS: dict[str, tuple[Callable[["Job", Plan], None], Callable[[random.Random, int], Sequence[int]], bool]] = {
    "kill": (_kill, lambda draw, ranks: [draw.randrange(ranks)], False),
    "kill-0": (_kill, lambda draw, ranks: [0], False),
    "kill-many": (_kill, lambda draw, ranks: draw.sample(range(ranks), draw.randint(1, ranks - 1)), False),
    "kill-twice": (_kill_twice, lambda draw, ranks: draw.sample(range(ranks), min(2, ranks - 1)), False),
    "stop": (_stop, lambda draw, ranks: [draw.randrange(ranks)], False),
    "kill-all": (_kill, lambda draw, ranks: range(ranks), True),
    "kill-launcher": (_kill_launcher, lambda draw, ranks: [], True),
}


class Job:
    """One start of a run under `mlm-mpi run`."""

    def __init__(self, words: Sequence[str]) -> None:
        self.said: list[tuple[float, str]] = []  # when, line
        self.hit = 0  # signals that found their rank
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mlm_mpi", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append((time.monotonic(), line.rstrip("\n")))

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the ranks, by rank."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, ValueError):
                environment = process.environ()
                name = next((rank for rank, _ in ANNOUNCED if rank in environment), None)
                if name is not None and "mlm_mpi" in process.cmdline():
                    found[int(environment[name])] = process
        return found

    def signal(self, victims: Sequence[int], number: signal.Signals) -> None:
        """Sends a signal to ranks that are there."""
        ranks = self.ranks() if self.process.poll() is None else {}
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess, KeyError):
                ranks[victim].send_signal(number)
                self.hit += 1

    def wait(self, timeout_s: float) -> bool:
        """Whether it ends in time; else it is killed."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return False
        self._reader.join(_ORPHANS_S)
        return True

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.said)


def drawn(fault: str, trial: int, seed: int, ranks: int, steps: int) -> Plan:
    """What happens in a trial: the same for the same seed."""
    draw = random.Random(hashlib.sha256(f"{seed} {fault} {trial}".encode()).digest())
    return Plan(fault, draw.randrange(1, steps), draw.random(), tuple(FAULTS[fault][1](draw, ranks)))


class Chaos:
    """Trials of one configuration in a folder of their own."""

    def __init__(self, args: argparse.Namespace, folder: Path, steps: int) -> None:
        self.args, self.folder, self.steps = args, folder, steps
        self.took_s = self.step_s = 0.0
        self.weights, self.losses = "", list[float]()
        self.job: Job | None = None

    def _start(self, name: str) -> Job:
        self.job = Job(self._words(name))
        return self.job

    def stop(self) -> None:
        """Lets a job that was interrupted too save and leave."""
        if self.job is not None and self.job.process.poll() is None:
            self.job.process.send_signal(signal.SIGTERM)
            self.job.wait(_GRACE_S)

    def undisturbed(self) -> None:
        """The run that all others are compared with. Raises MlmError."""
        began, job = time.monotonic(), self._start("undisturbed")
        job.process.wait()
        job.wait(_ORPHANS_S)
        self.took_s = time.monotonic() - began
        self.weights = _weights(job)
        if job.process.returncode or not self.weights:
            word = job.said[-1][1] if job.said else "without a word"
            raise MlmError(f"the undisturbed run, {self.folder}/undisturbed, failed: {word}")
        lines = _lines(self.folder / "undisturbed")
        self.losses = [line["loss"] for line in lines]
        self.step_s = statistics.median(line["step_s"] for line in lines)

    def _words(self, name: str) -> list[str]:
        overrides = [word for text in self.args.set for word in ("--set", text)]
        run = str(self.folder / name)
        ranks = str(self.args.ranks)
        return ["run", "-n", ranks, "--", "train", self.args.config, "--run", run, *overrides, "--quiet"]

    def trial(self, plan: Plan) -> Outcome:
        """Runs a training into a fault, and what follows from it to the end."""
        name = f"{plan.fault}-{plan.step}-{plan.delay:.4f}"
        run, outcome = self.folder / name, Outcome(plan)
        job = self._start(name)
        limit_s = 60.0 + _PATIENCE * self.took_s
        self._until(job, run, plan.step, limit_s)
        time.sleep(plan.delay * self.step_s)
        at = time.monotonic()
        FAULTS[plan.fault][0](job, plan)
        ended = job.wait(limit_s)
        outcome.went_on_s = [then - at for then, line in job.said if line.startswith("ALARM lost ") and then > at]
        if not ended:
            outcome.wrong = f"it hung; it said last: {job.said[-1][1] if job.said else 'nothing'}"
        elif plan.victims and not job.hit:
            outcome.wrong = "the run was over before the fault: give it more steps (train.steps)"
        elif left := self._left(run):
            outcome.wrong = f"processes {left} were left"
        elif FAULTS[plan.fault][2] or not _weights(job):
            outcome.again, job = True, self._start(name)  # as a person would
            if not job.wait(limit_s):
                outcome.wrong = "the next start hung"
        outcome.wrong = outcome.wrong or self._wrong(job, run)
        if not outcome.wrong:
            shutil.rmtree(run, ignore_errors=True)
        return outcome

    def _until(self, job: Job, run: Path, step: int, limit_s: float) -> None:
        end = time.monotonic() + limit_s
        while job.process.poll() is None and time.monotonic() < end and len(_lines(run)) < step:
            time.sleep(0.002)

    def _left(self, run: Path) -> list[int]:
        """Processes of a run that are still there some seconds after its end."""
        end = time.monotonic() + _ORPHANS_S
        while True:
            found = []
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if str(run) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process.pid)
            if not found or time.monotonic() > end:
                return found
            time.sleep(0.05)

    def _wrong(self, job: Job, run: Path) -> str:
        if _weights(job) != self.weights:
            return f"exit code {job.process.returncode}, {_weights(job) or 'no hash'}: {job.text[-300:]}"
        lines = _lines(run)
        if [line["step"] for line in lines] != list(range(1, self.steps + 1)):
            return f"metrics.jsonl has steps {[line['step'] for line in lines]}"
        if [line["loss"] for line in lines] != self.losses:
            return "losses differ"
        if half := list((run / "checkpoints").glob(".*")):
            return f"{half[0].name} was left"
        return self._unproven(run)

    def _unproven(self, run: Path) -> str:
        """Why the run's ledger does not prove that each sample was used exactly once."""
        from mlm_mpi.train.proof import prove  # here, not above: --help needs no NumPy

        try:
            proof = prove(run)
        except MlmError as error:
            return f"verify: {error}"
        return "" if proof.holds else f"verify: {[*proof.wrong, proof.unproven][0]}"


def _weights(job: Job) -> str:
    last = job.said[-1][1] if job.said else ""
    return last.split()[2] if last.startswith("weights sha256 ") else ""


def _lines(run: Path) -> list[dict[str, Any]]:
    try:
        return list(read_metrics(run / "metrics.jsonl"))
    except MlmError:  # not there yet
        return []


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each fault. Milliseconds: from the fault until the others have said that they go on."""
    heads = "fault", "trials", "passed", "started again", "going on, median ms", "95 %", "most"
    rows = [f"| {' | '.join(heads)} |", "|---|" + (len(heads) - 1) * "---:|"]
    for fault in dict.fromkeys(outcome.plan.fault for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.plan.fault == fault]
        passed = sum(not outcome.wrong for outcome in mine)
        times = sorted(1000 * max(outcome.went_on_s) for outcome in mine if outcome.went_on_s)
        cells = ["–"] * 3
        if times:
            late = times[math.ceil(0.95 * len(times)) - 1]
            cells = [f"{number:.0f}" for number in (statistics.median(times), late, times[-1])]
        again = sum(outcome.again for outcome in mine)
        rows.append(f"| {fault} | {len(mine)} | {passed} | {again} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _checked(args: argparse.Namespace) -> tuple[list[str], int]:
    """(faults, steps of a run). Raises ConfigError."""
    faults = args.faults.split(",")
    if unknown := [name for name in faults if name not in FAULTS]:
        raise ConfigError(f"--faults names {unknown[0]!r}: choose among {', '.join(FAULTS)}")
    if args.ranks < 2:
        raise ConfigError(f"-n {args.ranks} must be at least 2: somebody has to be left")
    if args.trials < 1:
        raise ConfigError(f"--trials {args.trials} must be at least 1")
    config = configuration.load(args.config, args.set)
    configuration.check_ranks(config, args.ranks)
    if config.train.steps < 2:
        raise ConfigError(f"train.steps = {config.train.steps} must be at least 2: something has to follow a fault")
    return faults, config.train.steps


def _run(chaos: Chaos, plans: Sequence[Plan]) -> list[Outcome]:
    """The trials, told one by one where they fail; Ctrl-C ends them early."""
    bar, outcomes = live("chaos"), list[Outcome]()
    try:
        bar.update(0, len(plans), "an undisturbed run")
        chaos.undisturbed()
        print(f"undisturbed: {chaos.took_s:.1f} s, weights {chaos.weights[:12]}", flush=True)
        for plan in plans:
            bar.update(len(outcomes), len(plans), f"{plan.fault} after step {plan.step}")
            outcomes.append(chaos.trial(plan))
            if outcomes[-1].wrong:
                print(f"FAILED {plan}: {outcomes[-1].wrong}", flush=True)
    except KeyboardInterrupt:
        chaos.stop()
        print(f"interrupted after {len(outcomes)} of {len(plans)} trials", flush=True)
    finally:
        bar.close()
    return outcomes


def _writable(path: str) -> None:
    """Finds out before the trials what would lose their table. Raises ConfigError."""
    try:
        with open(path, "a"):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out {path} cannot be written: {error.strerror}: give a file in a folder that is there"
        ) from None


def main(args: argparse.Namespace) -> int:
    """Runs the trials; exit code 1 if one has failed, 130 after Ctrl-C. Raises ConfigError, MlmError."""
    faults, steps = _checked(args)
    if args.out:
        _writable(args.out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="mlm-mpi-chaos-"))
    chaos = Chaos(args, folder, steps)
    plans = [drawn(fault, trial, args.seed, args.ranks, steps) for trial in range(args.trials) for fault in faults]
    outcomes = _run(chaos, plans)
    text = table(sorted(outcomes, key=lambda outcome: faults.index(outcome.plan.fault)))
    if outcomes:
        print(text, flush=True)
    if args.out:
        overrides = "".join(f" --set {text}" for text in args.set)
        head = f"`mlm-mpi chaos {args.config}{overrides} -n {args.ranks} --trials {args.trials} --faults {args.faults} "
        head += f"--seed {args.seed}`"
        Path(args.out).write_text(f"{head}, {os.uname().nodename}, undisturbed {chaos.took_s:.1f} s\n\n{text}\n")
    failed = sum(bool(outcome.wrong) for outcome in outcomes)
    if failed:
        print(f"{failed} of {len(outcomes)} failed; their run folders are in {folder}", flush=True)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    if len(outcomes) < len(plans):
        return 130
    print(f"all {len(outcomes)} passed", flush=True)
    return 0
