"""Real `mlm-mpi` processes on a tiny model and corpus: how the tests of whole programs start and read them."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

from mlm_mpi.train.proof import Proof, prove

TIMEOUT_S = 90
SOON_S = 30  # a job that is to end at once; a start on a busy machine takes a third of it

# J = 8 lanes of two micro-batches, dropout on
CONFIG = """
[model]
layers = 1
width = 32
heads = 2
context = 16
dropout = 0.1
[data]
dir = "{corpus}"
[train]
steps = 6
micro_batches = 16
lanes = 8
rows = 2
seed = 3
[optim]
learning_rate = 1e-2
warmup_steps = 2
[eval]
every = 3
rows = 16
[comm]
bucket_mib = 0.02
timeout_s = 60
[log]
every = 1
curve = false
"""

EVERY_TWO = ("checkpoint.every=2", "checkpoint.keep=3")

# Runs what is given as FAULT in every rank before the program: `before_step(rank, step)` may be replaced.
FAULTY = """
import os, sys
from mlm_mpi.__main__ import entry
from mlm_mpi.train.engine import Engine

inner = Engine.step

def step(self, number, *rest):
    before_step(self.group.rank, number)
    return inner(self, number, *rest)

Engine.step = step
{fault}
entry()
"""

# A fault: rank 1 is killed when it begins step {step}, counted from 0.
RANK_DIES = """
import signal

def before_step(rank, step):
    if rank == 1 and step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
"""

# `mlm-mpi run` for another program than `python -m mlm_mpi`
LAUNCH = (
    "import sys; from mlm_mpi.comm.launch import supervise; from mlm_mpi.launcher import Limits, run_job; "
    "sys.exit(supervise(lambda: run_job([sys.executable, '-P', *sys.argv[2:]], int(sys.argv[1]), limits=None)))"
)
RECOVERING_LAUNCH = LAUNCH.replace("limits=None", "limits=Limits(joins=True, recovers=True)")


@dataclass(frozen=True)
class Ended:
    """A process that is over."""

    code: int
    out: str
    err: str

    @property
    def weights(self) -> str:
        """The hash in the last line of a run that ended well."""
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self.said_weights

    @property
    def said_weights(self) -> str:
        last = self.out.splitlines()[-1]
        assert re.fullmatch("weights sha256 [0-9a-f]{64}", last), f"{last!r} is no hash line\n{self.out}\n{self.err}"
        return last.split()[-1]

    def refused(self, *texts: str, code: int = 2) -> None:
        """One clear line on stderr that holds the texts, that exit code, no traceback, no launcher's banner."""
        assert self.code == code, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert self.err.startswith("mlm-mpi: ") and self.err.count("\n") == 1, self.err
        for text in texts:
            assert text in self.err, f"{text!r} is not in {self.err}"


class Place:
    """A folder with a configuration, and files that Python must not take for libraries; starts programs in it."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.corpus = folder, corpus
        self.config = folder / "tiny.toml"
        self.config.write_text(CONFIG.format(corpus=corpus))
        for name in ("tokenizers", "numpy", "rich"):
            (folder / f"{name}.py").write_text("raise SystemExit('a file of the current folder was imported')\n")

    def words(self, run: str, ranks: int | None, *more: str) -> list[str]:
        """The command line of a training; `ranks=None`: without a launcher. `a.b=c` becomes `--set a.b=c`."""
        launcher = [] if ranks is None else ["run", "-n", str(ranks), "--"]
        return [*launcher, "train", str(self.config), "--run", run, *_settings(more)]

    def train(self, run: str, ranks: int | None, *more: str) -> Ended:
        return self.program(*self.words(run, ranks, *more))

    def program(self, *words: str, **environment: str) -> Ended:
        return ended(self.start(*words, **environment))

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        return self.popen([sys.executable, "-P", "-m", "mlm_mpi", *words], **environment)

    def faulty(self, fault: str, run: str, ranks: int, *more: str, recovers: bool = False) -> Ended:
        """A training in which each rank runs `fault` first. `recovers`: the others may live on when one dies."""
        return self.faulty_program(fault, ranks, *self.words(run, None, *more), recovers=recovers)

    def faulty_program(self, fault: str, ranks: int, *words: str, recovers: bool = False) -> Ended:
        """The same of any command."""
        launch = RECOVERING_LAUNCH if recovers else LAUNCH
        script = str(self.faulty_script(fault))
        return ended(self.popen([sys.executable, "-P", "-c", launch, str(ranks), script, *words]))

    def faulty_script(self, fault: str) -> Path:
        """A program like mlm-mpi that runs `fault` first."""
        script = self.folder / "faulty.py"
        script.write_text(FAULTY.format(fault=fault))
        return script

    def popen(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=self.folder, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, encoding="utf-8",
        )  # fmt: skip

    def checkpoints(self, run: str) -> list[str]:
        return sorted(path.name for path in (self.folder / run / "checkpoints").iterdir())

    def copy_of(self, other: "Place", run: str) -> Path:
        """Another place's run folder, copied here."""
        return Path(shutil.copytree(other.folder / run, self.folder / run))

    def proven(self, run: str) -> Proof:
        """What the ledger of a run shows: that each sample was used exactly once, up to where the run stands."""
        proof = prove(self.folder / run)
        assert proof.holds and not proof.begins, proof
        assert self.checkpoints(run)[-1] == f"step-{proof.steps:08}"
        return proof

    def losses(self, run: str) -> list[tuple[float, float | None]]:
        """(loss, held-out loss) of every step. Asserts that each step is there once, in order."""
        records = [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        return [(record["loss"], record.get("heldout_loss")) for record in records]


def _settings(words: tuple[str, ...]) -> list[str]:
    """`section.key=value` -> `--set section.key=value`; other words as they are."""
    return [part for word in words for part in (["--set", word] if re.match(r"[a-z]+\.\w+=", word) else [word])]


def ended(process: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> Ended:
    """Waits for a process; one that takes longer is killed with all it started, and the test fails."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            member.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s\n{out}\n{err}") from None
    return Ended(process.returncode, out, err)


def seen(process: subprocess.Popen[str], text: str) -> str:
    """Reads stdout up to the first line that holds `text`; a program that does not say it in time is killed."""
    assert process.stdout is not None
    patience = threading.Timer(TIMEOUT_S, process.kill)
    patience.start()
    try:
        for line in process.stdout:
            if text in line:
                return line
    finally:
        patience.cancel()
    raise AssertionError(f"ended before {text!r}: {process.communicate()}")


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of a job's ranks, in rank order."""
    family = psutil.Process(process.pid).children(recursive=True)
    found = {}
    for member in family:
        rank = member.environ().get("OMPI_COMM_WORLD_RANK") or member.environ().get("PMI_RANK")
        if rank is not None:
            found[int(rank)] = member
    return [found[rank] for rank in sorted(found)]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def make_text(folder: Path, seed: int = 1) -> Path:
    """Twenty files of words that repeat: what a tiny model can learn something from."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(200)]
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02}.txt").write_text(" ".join(draw.choices(words, k=400)) + "\n")
    return folder


def prepare(source: Path, out: Path, *options: str) -> Path:
    words = ["prepare", str(source), "--out", str(out), "--shard-mib", "0.01", *options]
    subprocess.run([sys.executable, "-m", "mlm_mpi", *words], check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
    return out
