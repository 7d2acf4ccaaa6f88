"""Runs that are killed, interrupted or broken in the middle end at once, leave nothing behind, and go on exactly."""

import re
import signal
import time

import pytest
from programs import SOON_S, Ended, Place, alive, ended, ranks_of, seen

LONG = ("train.steps=40", "checkpoint.every=4", "eval.windows=16")


@pytest.fixture(scope="module")
def undisturbed(home: Place) -> Ended:
    """Forty steps on one rank."""
    return home.train("long", None, *LONG)


def stopped_after(text: str) -> int:
    found = re.search(r"^stopped after step (\d+) of 40 ", text, re.MULTILINE)
    assert found, text
    return int(found[1])


@pytest.mark.slow
def test_each_signal_in_turn_and_the_last_bits_are_those_of_an_undisturbed_run(place, home, undisturbed):
    """SIGINT on 2 ranks, SIGTERM on 3, SIGUSR1 on 1, the rest on 2: each saves at an agreed step and leaves."""
    done = 0
    signals = [
        (2, signal.SIGINT, 130, "mlm-mpi run: Ctrl-C: stopping after this step; Ctrl-C again kills\n"),
        (3, signal.SIGTERM, 143, "mlm-mpi run: SIGTERM: stopping after this step\n"), (1, signal.SIGUSR1, 0, ""),
    ]  # fmt: skip
    for ranks, number, code, said in signals:
        job = place.start(*place.words("run", ranks, *LONG))
        seen(job, f"step {done + 2:>2}/40")
        members = ranks_of(job)
        assert len(members) == ranks
        job.send_signal(number)
        stopped = ended(job, SOON_S)
        assert (stopped.code, stopped.err) == (code, said)
        assert not alive(members)
        step = stopped_after(stopped.out)
        assert done + 2 <= step < 40
        assert stopped.said_weights and not (place.folder / "run" / "DONE").exists()
        assert place.checkpoints("run")[-1] == f"step-{step:08}"
        assert len(place.losses("run")) == step
        done = step
    assert place.train("run", 2, *LONG).weights == undisturbed.weights
    assert place.losses("run") == home.losses("long")


def test_without_recovery_a_rank_that_is_killed_ends_the_job_and_the_next_start_goes_on(place, home, undisturbed):
    job = place.start(*place.words("run", 3, *LONG, "comm.recover=false"))
    seen(job, "step 10/40")
    members = ranks_of(job)
    members[1].kill()
    killed = ended(job, SOON_S)
    assert killed.code == 137
    assert killed.err.startswith("mlm-mpi run: rank 1 died by signal 9 (SIGKILL)") and killed.err.count("\n") == 1
    assert not alive(members)
    assert not (place.folder / "run" / "DONE").exists()
    assert [name for name in place.checkpoints("run") if name.startswith("step-")]  # 8 may still have been on its way
    again = place.train("run", 2, *LONG)
    assert again.weights == undisturbed.weights
    assert re.search(r"run +steps (5|9|13|17|21|25|29|33|37) to 40", again.out)
    assert place.losses("run") == home.losses("long")
    assert not [name for name in place.checkpoints("run") if name.startswith(".")]


def test_a_limit_of_time_saves_and_leaves(place):
    stopped = place.train("run", None, "train.steps=4000", "--max-time", "0.2s")
    assert stopped.said_weights
    assert re.search(r"stopped after step \d+ of 4000 .*--max-time", stopped.out)


RAISE = """
def before_step(rank, step):
    if rank == 1 and step == 3:
        raise ZeroDivisionError("injected")
"""


def test_a_bug_on_one_rank_ends_the_job_with_its_traceback(place, straight):
    begin = time.monotonic()
    broken = place.faulty(RAISE, "run", 3, "checkpoint.every=2", "comm.timeout_s=600")
    assert time.monotonic() - begin < SOON_S
    assert broken.code == 1
    assert broken.err.startswith("mlm-mpi: rank 1 of 3 failed:\nTraceback (most recent call last):\n")
    assert broken.err.endswith("ZeroDivisionError: injected\n")
    assert broken.err.count("Traceback") == 1
    assert place.train("run", None).weights == straight.weights


WAIT = """
import signal, time
def before_step(rank, step):
    if rank == 1 and step == 2:
        {how}
"""


@pytest.mark.parametrize(
    ("how", "state"),
    [
        pytest.param("time.sleep(60)", "", id="asleep"),
        # the test below stops one too, where it is harder to tell
        pytest.param("os.kill(os.getpid(), signal.SIGSTOP)", ", stopped", id="stopped", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_never_comes_is_named_after_the_time_allowed(place, how, state):
    """By one of the two that wait, with what it did last; the other does not blame anybody."""
    held = place.faulty(WAIT.format(how=how), "run", 3, "comm.timeout_s=2")
    held.refused(
        "mlm-mpi: rank 1 did not arrive, 2 of 3 ranks wait for ", "(comm.timeout_s = 2)", f"{state}) (comm", code=75
    )
    assert re.search(r"; rank 1 did last, \d s ago: what follows step 2 \(process \d+ on ", held.err)


STOPS_WHILE_IT_WAITS = """
import signal
from mlm_mpi.comm.group import Group
inside, where = Group.wait_until, {"step": -1}

def before_step(rank, step):
    where["step"] = step

def wait_until(self, awaited, what):
    def poll():
        if self.rank == 1 and where["step"] == 2 and "losses" in what:
            os.kill(os.getpid(), signal.SIGSTOP)
        return awaited()
    return inside(self, poll, what)

Group.wait_until = wait_until
"""


def test_a_rank_that_is_stopped_while_it_waits_is_named_too(place):
    """Its sign says that it waits, as those of the others do."""
    held = place.faulty(STOPS_WHILE_IT_WAITS, "run", 3, "comm.timeout_s=2")
    held.refused(
        "mlm-mpi: rank 1 did not arrive, 2 of 3 ranks wait for ",
        "waiting for the losses of step 3",
        ", stopped)",
        code=75,
    )


KILL_WHILE_SAVING = """
import signal
from mlm_mpi.train import checkpoint
before_step = lambda rank, step: None

def dies(inner):
    def write(path, *rest):
        if path.name == "{file}" and "step-00000004" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(path, *rest)
    return write

checkpoint.publish, checkpoint.publishing = dies(checkpoint.publish), dies(checkpoint.publishing)
"""


@pytest.mark.parametrize("file", [pytest.param("part-0001.h5", marks=pytest.mark.slow), "manifest.json"])
def test_a_rank_that_is_killed_while_it_saves_leaves_no_half_checkpoint(place, straight, file):
    killed = place.faulty(KILL_WHILE_SAVING.format(file=file), "run", 2, "checkpoint.every=2")
    assert killed.code == 137
    assert place.checkpoints("run") == [".writing-step-00000004", "step-00000002"]
    assert place.train("run", None).weights == straight.weights
    assert place.checkpoints("run") == ["step-00000002", "step-00000006"]
