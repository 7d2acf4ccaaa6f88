"""The job script, submitted to a real Slurm: how its tests start jobs and read what came of them."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from programs import Place

LAB = Path(__file__).parent / "lab"
LAB_FOLDER = Path("/run/lab")
SCRIPT = Path(__file__).parents[2] / "jobs" / "train.sbatch"
TIMEOUT_S = 120
STEPS = 500  # 5 to 40 seconds on two ranks of two cores
SETTINGS = (f"train.steps={STEPS}", "eval.every=100000", "log.every=100")

# two nodes share the cores of this machine, so no rank may spin
SITE = f"""
export PATH="{Path(sys.executable).parent}:$PATH" OMPI_MCA_mpi_yield_when_idle=1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
"""


def command(*words: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """stdout of a program that must end well."""
    done = subprocess.run(
        words, cwd=cwd, env=os.environ | environment, check=False, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


class Job:
    """One submission of the job script."""

    def __init__(self, number: str, run: Path, log: Path) -> None:
        self.number, self.run, self.log = number, run, log

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait(self, what: Callable[[], bool]) -> None:
        """Returns when it is so. Patience ends `TIMEOUT_S` after the last step, for the machine may be busy."""
        seen, end = -1, 0.0
        while not what():
            if seen != self.steps():
                seen, end = self.steps(), time.monotonic() + TIMEOUT_S
            assert time.monotonic() < end, f"nothing happens for {TIMEOUT_S} s:\n{self.text()}"
            time.sleep(0.1)

    def steps_are_made(self, number: int = 20) -> None:
        self.wait(lambda: self.steps() >= number)

    def record(self) -> str:
        """What Slurm says of it."""
        return command("scontrol", "show", "job", self.number)

    def requeued(self, number: int = 1) -> None:
        """Asserts that its log says so."""
        assert f"train.sbatch: requeue {number} of 50\n" in self.text()

    def leaves(self, state: str, restarts: int | None = None) -> None:
        """Waits until none of its processes is left, then asserts what Slurm says of it and that its log is clean."""
        self.wait(lambda: not command("squeue", "-h", "--states=RUNNING,COMPLETING", f"--jobs={self.number}"))
        text = self.record()
        assert f"JobState={state} " in text, text + self.text()
        assert restarts is None or f" Restarts={restarts} " in text, text + self.text()
        assert b"\0" not in self.log.read_bytes()
        assert "-" * 60 not in self.text() and "Traceback" not in self.text(), self.text()

    def saved(self) -> int:
        """The last step made. Asserts that a checkpoint of it is the only one."""
        saved = [path.name for path in (self.run / "checkpoints").iterdir()]
        assert saved == [f"step-{self.steps():08}"], self.text()
        assert f"stopped after step {self.steps()} of {STEPS} " in self.text()
        return self.steps()

    def weights(self) -> str:
        """The hash that it said last."""
        assert (self.run / "DONE").exists(), self.text()
        return re.findall(r"^weights sha256 ([0-9a-f]{64})$", self.text(), re.MULTILINE)[-1]


class Cluster(Place):
    """A folder from which jobs are submitted."""

    def submit(self, *options: str, run: str = "läufe/ein Lauf", plain: Path | None = None, **environment: str) -> Job:
        """A training of `STEPS` steps. `options` are sbatch's, and further settings a.b=c.

        The script submits itself with a site file of this folder. `plain`: this copy of it is given to sbatch alone.
        """
        (self.folder / "site.sh").write_text(SITE)
        own = ["--job-name=job", "--cpus-per-task=1", *(word for word in options if word.startswith("-"))]
        _, config, _, *rest = self.words(run, None, *SETTINGS, *(word for word in options if not word.startswith("-")))
        words = ["sbatch", *own, plain, config, *rest] if plain else [SCRIPT, *own, config, *rest]
        out = command(*words, cwd=self.folder, **({} if plain else {"SITE": "./site.sh"}) | environment)
        return self.job(re.findall(r"Submitted batch job (\d+)", out)[0], run)

    def job(self, number: str, run: str) -> Job:
        return Job(number, self.folder / run, self.folder / run / f"slurm-{number}.log")
