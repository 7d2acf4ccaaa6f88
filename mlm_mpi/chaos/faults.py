"""Every fault that `mlm-mpi chaos` knows: who it hits, how, and what must come of it."""

import hashlib
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mlm_mpi.chaos.job import Job


@dataclass(frozen=True)
class Plan:
    """A fault after step `step` of a run, `delay` of a step later, to these ranks."""

    fault: str
    step: int
    delay: float
    victims: tuple[int, ...]


Draw = Callable[[random.Random, int], Sequence[int]]


def _one(draw: random.Random, ranks: int) -> Sequence[int]:
    return [draw.randrange(ranks)]


def _first(draw: random.Random, ranks: int) -> Sequence[int]:
    return [0]


def _several(draw: random.Random, ranks: int) -> Sequence[int]:
    return draw.sample(range(ranks), draw.randint(1, ranks - 1))


def _two(draw: random.Random, ranks: int) -> Sequence[int]:
    return draw.sample(range(ranks), min(2, ranks - 1))


def _all(draw: random.Random, ranks: int) -> Sequence[int]:
    return range(ranks)


def _nobody(draw: random.Random, ranks: int) -> Sequence[int]:
    return []


def _send(number: signal.Signals) -> Callable[[Job, Plan], None]:
    return lambda job, plan: job.signal(plan.victims, number)


def _kill_twice(job: Job, plan: Plan) -> None:
    job.signal(plan.victims[:1], signal.SIGKILL)
    time.sleep(0.01 * plan.delay)
    job.signal(plan.victims[1:], signal.SIGKILL)


def _tell_launcher(number: signal.Signals) -> Callable[[Job, Plan], None]:
    return lambda job, plan: job.process.send_signal(number)


@dataclass(frozen=True)
class Fault:
    """`act`: what is done from outside; None: what `chaos/inside.py` has under the fault's name is done inside.

    `end`: the run goes on; it ends, and the next start goes on; it ends for good; it goes on without the micro-batch.
    `said`: words that must be said. `settings`: keys of the run; `spares`: ranks beyond those asked for.
    """

    says: str
    victims: Draw
    act: Callable[[Job, Plan], None] | None = None
    end: Literal["on", "again", "refused", "without"] = "on"
    said: str = ""
    settings: tuple[str, ...] = ()
    spares: int = 0


_CLEAN = "run again it was clean"

FAULTS = {
    "kill": Fault("SIGKILL to a rank", _one, _send(signal.SIGKILL)),
    "kill-0": Fault("SIGKILL to rank 0", _first, _send(signal.SIGKILL)),
    "kill-many": Fault("SIGKILL to several at once, all but one at most", _several, _send(signal.SIGKILL)),
    "kill-twice": Fault("SIGKILL to two within 10 ms", _two, _kill_twice),
    "kill-spare": Fault("SIGKILL to a rank beside a spare", _one, _send(signal.SIGKILL), spares=1),
    "collective": Fault("death inside a collective", _one),
    "in-flight": Fault("death with 16 messages under way", _one, settings=("comm.bucket_mib=0.004",)),
    "save": Fault("death while a checkpoint is written", _one, settings=("checkpoint.every=2",)),
    "segv": Fault("SIGSEGV", _one, _send(signal.SIGSEGV)),
    "abort": Fault("SIGABRT", _one, _send(signal.SIGABRT)),
    "memory": Fault("no more memory for a rank (RLIMIT_AS)", _one),
    "raise": Fault("an exception that nobody expects", _one),
    "exit": Fault("sys.exit(1)", _one),
    "leave": Fault("os._exit(3), of which MPI tells nobody", _one, None, "again", " has left by an exit code"),
    "stop": Fault("SIGSTOP", _one, _send(signal.SIGSTOP)),
    "spin": Fault("an endless loop", _one),
    "kill-launcher": Fault("SIGKILL to mlm-mpi run", _nobody, _tell_launcher(signal.SIGKILL), "again"),
    "kill-all": Fault("SIGKILL to every rank", _all, _send(signal.SIGKILL), "again"),
    "usr1": Fault("SIGUSR1 to mlm-mpi run, as before a time limit", _nobody, _tell_launcher(signal.SIGUSR1), "again"),
    "term": Fault("SIGTERM to mlm-mpi run, as before a preemption", _nobody, _tell_launcher(signal.SIGTERM), "again"),
    "poison": Fault("a micro-batch at which every rank raises", _all, None, "refused", "has failed on two ranks"),
    "disk": Fault(
        "no room for a checkpoint, for two steps", _all, said="checkpoint not saved", settings=("checkpoint.every=1",)
    ),
    "nan": Fault("a NaN in a rank's gradient, once", _one, said=_CLEAN),
    "spike": Fault("a gradient that is 10^6 times too large, once", _one, said=_CLEAN),
    "nan-rank": Fault("NaN in all of a rank's gradients", _one, said="only this rank's gradient is wrong"),
    "nan-data": Fault("a NaN in a micro-batch's gradient, wherever it runs", _all, None, "without", " skipped: "),
    "flip": Fault(
        "a bit that flips in a rank's weights", _one, said="has taken theirs", settings=("guard.compare_every=1",)
    ),
}  # fmt: skip


def drawn(fault: str, trial: int, seed: int, ranks: int, steps: int) -> Plan:
    """What happens in a trial: the same for the same seed."""
    draw = random.Random(hashlib.sha256(f"{seed} {fault} {trial}".encode()).digest())
    return Plan(fault, draw.randrange(1, steps), draw.random(), tuple(FAULTS[fault].victims(draw, ranks)))
