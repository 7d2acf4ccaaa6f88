"""A rank dies and the run goes on, to the bits of a run that nothing disturbed."""

import json
import re
import time

import pytest
from programs import EVERY_TWO, SOON_S, ended

from mlm_mpi import mpiexec


def _lacks_ulfm() -> bool:
    path = mpiexec.find()
    version = mpiexec.version_text(path)
    return not mpiexec.can_recover(path, mpiexec.vendor(version), mpiexec.openmpi_major(version))


pytestmark = pytest.mark.skipif(_lacks_ulfm(), reason="this MPI has no ULFM")

# where a rank dies in or after its fourth step: {victims} are kept from going on from there
DIES = """
import signal
from mlm_mpi.comm.group import Group
from mlm_mpi.train.checkpoint import Saver
from mlm_mpi.train.run import Run

at = [0]
me = int(os.environ["OMPI_COMM_WORLD_RANK"])

def before_step(rank, step):
    at[0] = step
    die_if("step")

def die_if(point):
    if point == {point!r} and me in {victims} and at[0] == {step}:
        os.kill(os.getpid(), signal.SIGKILL)

def before(point, kind, name, wanted=lambda *words: True):
    inner = getattr(kind, name)
    def method(self, *words):
        if wanted(*words):
            die_if(point)
        return inner(self, *words)
    setattr(kind, name, method)

def after(point, kind, name):
    inner = getattr(kind, name)
    def method(self, *words):
        found = inner(self, *words)
        die_if(point)
        return found
    setattr(kind, name, method)

before("agreement", Group, "agree")
after("agreed", Group, "agree")
before("losses", Group, "allgather_array", lambda row, what: "losses of step" in what)
before("measured", Group, "allgather_array", lambda row, what: what == "held-out losses")
before("save", Saver, "begin")
before("collected", Saver, "_collect")
before("words", Run, "_weights")
before("end", Group, "agree", lambda what: what == "the end of the training")
"""
BEFORE = ("step", "losses", "agreement")  # of all, the step is tried again
MIDDLE = (*BEFORE, "agreed", "save", "collected")
FEW = {("step", 0), ("agreed", 2), ("words", 0)}  # the others are slow


def cases():
    points = [(point, 3) for point in MIDDLE] + [(point, 5) for point in ("measured", "words", "end")]
    for point, step in points:
        for victim in (0, 2):
            marks = () if (point, victim) in FEW else pytest.mark.slow
            yield pytest.param(point, step, victim, marks=marks, id=f"{point}-{victim}")


def undisturbed(place, home, straight, found):
    """The bits, the numbers of every step once, and nothing left of a save that was under way."""
    assert found.weights == straight.weights and not (home.folder / "straight" / "stacks").exists()
    assert place.losses("run") == home.losses("straight")
    assert not [name for name in place.checkpoints("run") if name.startswith(".")]
    done = json.loads((place.folder / "run" / "DONE").read_text())
    assert (done["step"], done["weights_sha256"]) == (6, straight.weights)
    assert place.proven("run").steps == 6


@pytest.mark.parametrize(("point", "step", "victim"), list(cases()))
def test_a_rank_dies_and_the_others_go_on(place, home, straight, point, step, victim):
    fault = DIES.format(point=point, step=step, victims=[victim])
    found = place.faulty(fault, "run", 3, *EVERY_TWO, recovers=True)
    undisturbed(place, home, straight, found)
    made = step + (point not in BEFORE)  # by all three, the others by two
    ran = {rank: own * made + 8 * (6 - made) * (rank != victim) for rank, own in enumerate((6, 6, 4))}
    assert place.proven("run").ranks == ran, "by the names that ranks had at the start"
    if (point, victim) != ("end", 0):  # who has said the last words dies after them
        lost = re.findall(
            r"ALARM lost rank (\d) \(process \d+ on .*, last .*\): (\d) of 3 ranks go on after step (\d) ", found.out
        )
        assert lost == [(str(victim), "2", str(made))], found.out
        assert "\nnote: 1 of 3 ranks were lost on the way\n" in found.out
        shown = set(re.findall(r"step (\d)/6  loss (\d\.\d+) ", found.out))
        assert shown == set(re.findall(r"step (\d)/6  loss (\d\.\d+) ", straight.out)), "means of the same steps"
    assert found.err == "", "one line of rank 0 is enough"


ONE_SIDED = """
import signal
from mlm_mpi.comm.group import Group
from mlm_mpi.errors import PeerLost

me, at = int(os.environ["OMPI_COMM_WORLD_RANK"]), [0]
given = Group.allgather_array

def before_step(rank, step):
    at[0] = step

def allgather_array(self, row, what):
    found = given(self, row, what)
    if "losses of step" in what and at[0] == 3 and self.size == 3:
        if me == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if me == 1:
            raise PeerLost("a rank has died")
    return found

Group.allgather_array = allgather_array
"""


def test_who_has_all_it_needs_makes_no_step_that_another_cannot_make(place, home, straight):
    """Rank 2 dies behind its last message; rank 1 meets an error, rank 0 meets none and comes to the update."""
    found = place.faulty(ONE_SIDED, "run", 3, *EVERY_TWO, recovers=True)
    undisturbed(place, home, straight, found)
    assert "2 of 3 ranks go on after step 3" in found.out


@pytest.mark.parametrize(
    ("ranks", "victims"),
    [pytest.param(4, [0, 1, 2], id="all but one"), pytest.param(3, [1, 2], id="two", marks=pytest.mark.slow)],
)
def test_several_die_at_once(place, home, straight, ranks, victims):
    found = place.faulty(DIES.format(point="step", step=3, victims=victims), "run", ranks, *EVERY_TWO, recovers=True)
    undisturbed(place, home, straight, found)


@pytest.mark.slow
def test_another_rank_dies_in_the_recovery(place, home, straight):
    """While the others gather where they are."""
    fault = DIES.format(point="step", step=3, victims=[2]) + (
        "given = Group.allgather\n"
        "def allgather(self, value, what):\n"
        "    if what == 'where everybody is' and self.rank == 1 and self.size == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return given(self, value, what)\n"
        "Group.allgather = allgather\n"
    )
    found = place.faulty(fault, "run", 4, *EVERY_TWO, recovers=True)
    undisturbed(place, home, straight, found)
    assert "2 of 4 ranks go on after step 3" in found.out


@pytest.mark.slow  # chaos has it too
def test_when_all_die_the_job_ends_and_the_next_start_goes_on(place, home, straight):
    begin = time.monotonic()
    killed = place.faulty(DIES.format(point="step", step=5, victims=[0, 1, 2]), "run", 3, *EVERY_TWO, recovers=True)
    assert time.monotonic() - begin < SOON_S and killed.code != 0 and "start again" in killed.err
    assert not (place.folder / "run" / "DONE").exists()
    undisturbed(place, home, straight, place.train("run", 2, *EVERY_TWO))


ONCE = """
import pathlib
me = int(os.environ["OMPI_COMM_WORLD_RANK"])
def before_step(rank, step):
    flag = pathlib.Path("raised")
    if me == 1 and step == 3 and not flag.exists():
        flag.touch()
        {raises}
"""


@pytest.mark.parametrize(
    ("raises", "text"),
    [
        ('raise ZeroDivisionError("injected")', "mlm-mpi: rank 1 of 3 failed:\nTraceback "),
        pytest.param("sys.exit(3)", "", marks=pytest.mark.slow),
        pytest.param('raise MemoryError("injected")', "mlm-mpi: rank 1: out of memory", marks=pytest.mark.slow),
    ],
    ids=["bug", "exit", "memory"],
)
def test_a_rank_that_fails_ends_itself_and_no_other(place, home, straight, raises, text):
    found = place.faulty(ONCE.format(raises=raises), "run", 3, *EVERY_TWO, recovers=True)
    undisturbed(place, home, straight, found)
    assert found.err.startswith(text) and found.err.count("Traceback") == text.count("Traceback")


POISON = """
def before_step(rank, step):
    pass

from mlm_mpi.layers.chain import Chain
given = Chain.forward

def forward(self, x, ctx):
    if ctx.training and (ctx.step, ctx.batch.index) == (3, 5):
        raise ZeroDivisionError("injected")
    return given(self, x, ctx)

Chain.forward = forward
"""


@pytest.mark.parametrize("ranks", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_what_fails_on_two_ranks_ends_the_run(place, ranks):
    """It would kill one rank after another."""
    begin = time.monotonic()
    found = place.faulty(POISON, "run", ranks, *EVERY_TWO, recovers=True)
    assert time.monotonic() - begin < SOON_S
    assert found.code == 1 and found.err.count("ZeroDivisionError: injected\n") == (3 if ranks > 2 else 2)
    if ranks > 2:  # else the last one has nobody to tell
        last = found.err.splitlines()[-1]
        assert last == "mlm-mpi: step 4, micro-batch 5 has failed on two ranks: ZeroDivisionError: injected"


HELD_UP = """
import signal, time
def before_step(rank, step):
    if os.environ["OMPI_COMM_WORLD_RANK"] == "1" and step == 3:
        {how}
"""


def test_a_rank_that_is_stopped_is_killed(place, home, straight):
    begin = time.monotonic()
    fault = HELD_UP.format(how="os.kill(os.getpid(), signal.SIGSTOP)")
    found = place.faulty(fault, "run", 3, *EVERY_TWO, recovers=True)
    assert time.monotonic() - begin < SOON_S
    undisturbed(place, home, straight, found)
    named = r"mlm-mpi: rank 1 did last, \d s ago: .* \(process \d+ on .*, stopped\): killed, and the others go on\n"
    assert re.fullmatch(named, found.err)
    assert not (place.folder / "run" / "stacks").exists(), "who is stopped can show none"


def test_a_rank_that_never_comes_is_killed_after_the_time_allowed(place, home, straight):
    fault = HELD_UP.format(how="time.sleep(60)")
    found = place.faulty(fault, "run", 3, *EVERY_TWO, "comm.timeout_s=2", recovers=True)
    undisturbed(place, home, straight, found)
    named = r"mlm-mpi: rank 1 did not arrive, 2 of 3 ranks wait .*\): look at .*: killed, and the others go on\n"
    assert re.fullmatch(named, found.err)


def test_a_rank_that_leaves_without_a_word_ends_the_job(place, home, straight):
    """MPI tells nobody of an exit code: the others look for its process."""
    begin = time.monotonic()
    found = place.faulty(HELD_UP.format(how="os._exit(3)"), "run", 3, *EVERY_TWO, recovers=True)
    assert time.monotonic() - begin < SOON_S and found.code == 75, found.err
    assert re.search(r"mlm-mpi: rank 1 did last, \d+ s ago: .* has left by an exit code or MPI_Abort, ", found.err)
    undisturbed(place, home, straight, place.train("run", 2, *EVERY_TWO))


def test_bad_input_of_one_rank_before_the_first_step_ends_the_job(place):
    """As without recovery: one line, exit code 2."""
    fault = """
from mlm_mpi.errors import DataError
from mlm_mpi.comm.group import Group
given = Group.on_node
def before_step(rank, step):
    pass
def on_node(self):
    if self.rank == 1:
        raise DataError("a shard is damaged")
    return given(self)
Group.on_node = on_node
"""
    found = place.faulty(fault, "run", 3, recovers=True)
    assert found.code == 2 and found.err.startswith("mlm-mpi: rank 1: a shard is damaged\n"), found.err
    assert found.err.count("\n") <= 2


def test_the_start_says_what_a_death_means(place):
    process = place.start(*place.words("run", 2, "--max-steps", "1"))
    assert re.search("if a rank dies +the others go on, to the same bits", ended(process).out)
    off = place.train("run", 2, "comm.recover=false", "--max-steps", "1")
    assert re.search(r"if a rank dies +the job ends, and the same command goes on \(comm.recover is off\)", off.out)


def test_chaos_finds_nothing_wrong(place):
    """One trial of the fault that costs most to get right; more of it by hand: `mlm-mpi chaos`."""
    found = place.program("chaos", str(place.config), "-n", "3", "--trials", "1", "--faults", "kill-twice")
    assert found.code == 0 and found.out.endswith("all 1 passed\n"), found.out + found.err
    assert re.search(r"\| kill-twice \| 1 \| 1 \| 0 \| \d+ ", found.out)


SPOILED = """
from mlm_mpi.layers.chain import Chain
me, left = int(os.environ["OMPI_COMM_WORLD_RANK"]), [{times}]
given = Chain.backward

def before_step(rank, step):
    pass

def backward(self, dy, kept, ctx, *rest):
    found = given(self, dy, kept, ctx, *rest)
    if {when} and left[0]:
        left[0] -= 1
        next(iter(ctx.gradients.values()))[0, 0] = {value}
    return found

Chain.backward = backward
"""


def test_a_gradient_that_is_once_not_finite_changes_no_bit(place, home, straight):
    fault = SPOILED.format(times=1, when="(ctx.step, ctx.micro_batch) == (3, 5)", value="float('nan')")
    found = place.faulty(fault, "run", 2, *EVERY_TWO, recovers=True)
    undisturbed(place, home, straight, found)
    assert "\nALARM step 4: the gradient of " in found.out and "run again it was clean\n" in found.out


def test_a_rank_whose_gradients_are_not_finite_leaves(place, home, straight):
    """Its micro-batch is sound on another rank: nothing is skipped."""
    fault = SPOILED.format(times=10**6, when="me == 1 and ctx.step >= 3", value="float('nan')")
    found = place.faulty(fault, "run", 3, *EVERY_TWO, recovers=True)
    undisturbed(place, home, straight, found)
    assert "mlm-mpi: rank 1: step 4, micro-batch 6: only this rank's gradient is wrong: it is ill\n" in found.err
    assert "2 of 3 ranks go on after step 3" in found.out and "skipped" not in found.out


def test_a_rank_that_computes_wrongly_leaves_and_the_others_go_on(place, home, straight):
    """Found by the audit at its first step, before any update."""
    fault = SPOILED.format(times=10**6, when="me == 1", value="0.5")
    found = place.faulty(fault, "run", 3, *EVERY_TWO, "guard.audit_every=1", recovers=True)
    assert found.weights == straight.weights, found.out
    assert re.search(r"mlm-mpi: rank 1: step \d, micro-batch \d+: this rank computes another gradient", found.err)
    assert "2 of 3 ranks go on" in found.out


LEFT_OUT = """
def before_step(rank, step):
    pass

given = Engine.plan

def plan(self, *words):
    self.quarantine[3, 5] = "left out"
    return given(self, *words)

Engine.plan = plan
"""


def test_the_run_does_without_what_fails_on_two_ranks_where_it_may(place):
    """To the bits of a rank that never ran it."""
    found = place.faulty(POISON, "run", 4, *EVERY_TWO, "guard.failing=skip", recovers=True)
    said = "ALARM step 4: micro-batch 5 skipped: it has failed on two ranks: ZeroDivisionError: injected"
    assert said in found.out.splitlines() and "2 of 4 ranks go on" in found.out
    assert found.weights == place.faulty(LEFT_OUT, "alone", 1).weights


@pytest.mark.parametrize(
    ("step", "victims"),
    [(3, [1]), pytest.param(3, [0], marks=pytest.mark.slow), pytest.param(3, [0, 3], marks=pytest.mark.slow)],
)
def test_a_spare_takes_the_place_of_a_rank_that_dies(place, home, straight, step, victims):
    fault = DIES.format(point="step", step=step, victims=victims)
    found = place.faulty(fault, "run", 4, *EVERY_TWO, "comm.spares=1", recovers=True)
    undisturbed(place, home, straight, found)
    left = 4 - len(victims)
    assert re.search(rf"{left} of 4 ranks go on after step 3 \(\d.\d\d s\), {min(3, left)} of them at work", found.out)
    assert re.search(r"lanes +8 over 3 ranks", found.out)
    assert "the others go on, to the same bits; 1 spare stands ready" in found.out


def test_spares_are_started_beside_the_ranks_that_work(place, straight):
    process = place.start("run", "-n", "2", "--spares", "1", *place.words("run", 2)[3:])
    found = ended(process)
    assert found.weights == straight.weights
    assert "pp 1 × dp 3 × tp 1: 3 ranks" in found.out and "8 over 2 ranks" in found.out


def test_spares_of_no_use_are_refused(place):
    place.train("run", 2, "comm.spares=2").refused("comm.spares = 2 leaves none of 2 ranks to work")
    place.train("run", 2, "comm.spares=1", "comm.recover=false").refused("comm.spares = 1 are for a job that goes on")
    place.train("run", None, "comm.spares=1").refused("comm.spares = 1 leaves none of 1 ranks")
    place.program("run", "-n", "2", "--spares", "-1", "--", "train", "x").refused("--spares -1 must not be negative")
    place.program("run", "-n", "2", "--spares", "1", "--", "prepare", "x").refused("--spares 1 is for train")


# a rank's backward in its fourth step; fast: the longest backward of this model takes some milliseconds
STALLS = """
import time
from mlm_mpi.layers.chain import Chain
inner_backward = Chain.backward

def before_step(rank, step):
    pass

def spin():
    while True:
        pass

def hold():
    time.sleep(10**6)

def backward(self, dy, kept, ctx, *more):
    if {whose} and ctx.step == 3:
        {how}()
    return inner_backward(self, dy, kept, ctx, *more)

Chain.backward = backward
"""


OF_ONE = 'os.environ["OMPI_COMM_WORLD_RANK"] == "1"'
SHORTLY = "comm.stall_s=1"


@pytest.mark.parametrize("how", [pytest.param("spin", marks=pytest.mark.slow), "hold"])
def test_a_rank_that_stalls_is_shown_with_its_stack_and_killed(place, home, straight, how):
    """Busy or asleep: not by comm.timeout_s, whose words are others."""
    found = place.faulty(STALLS.format(how=how, whose=OF_ONE), "run", 3, *EVERY_TWO, SHORTLY, recovers=True)
    undisturbed(place, home, straight, found)
    named = (
        r"mlm-mpi: rank 1 did last, \d+ s ago: step 4, micro-batch \d+, backward \(process \d+ on .*\), which took it "
        rf"[\d.e-]+ s at most before; it was in {how} \(faulty\.py:\d+\) < backward \(faulty\.py:\d+\) < .*; "
        r"the stacks of all: run/stacks: killed, and the others go on\n"
    )
    assert re.fullmatch(named, found.err)
    stacks = {path.name: path.read_text() for path in (place.folder / "run" / "stacks").iterdir()}
    assert sorted(stacks) == ["rank-0.txt", "rank-1.txt", "rank-2.txt"]
    assert f"in {how}\n" in stacks["rank-1.txt"] and "in wait_until\n" in stacks["rank-0.txt"]


@pytest.mark.slow
def test_what_stalls_on_two_ranks_ends_the_run(place):
    """It would take one rank after another."""
    fault = STALLS.format(how="spin", whose="ctx.batch.index == 5")
    found = place.faulty(fault, "run", 4, *EVERY_TWO, SHORTLY, recovers=True)
    last = found.err.splitlines()[-1]
    assert last.startswith(
        "mlm-mpi: step 4, micro-batch 5 has failed on two ranks: it held up the others; it was in spin "
    )
    assert found.code == 2 and found.err.count(": killed, and the others go on\n") == 2


@pytest.mark.slow
def test_a_rank_that_stalls_is_shown_where_the_job_cannot_go_on(place):
    begin = time.monotonic()
    found = place.faulty(STALLS.format(how="spin", whose=OF_ONE), "run", 3, SHORTLY)
    assert time.monotonic() - begin < SOON_S and found.code == 75
    assert re.match(r"mlm-mpi: rank 1 did last, .* it was in spin .*: run/stacks: start again to go on\n", found.err)


@pytest.mark.slow
def test_nobody_watches_where_the_time_is_zero(place):
    """Then comm.timeout_s is what there is, as for everything that takes a time of its own."""
    fault = STALLS.format(how="spin", whose=OF_ONE)
    found = place.faulty(fault, "run", 2, "comm.stall_s=0", "comm.timeout_s=4", recovers=True)
    assert "mlm-mpi: rank 1 did not arrive, " in found.err and "; it was in spin " in found.err and found.weights


SKIPS = """
import numpy as np
from mlm_mpi.comm.group import Group
given = Group.allgather_array

def before_step(rank, step):
    pass

def allgather_array(self, row, what):
    if what == "the losses of step 5" and self.rank == 1:
        return np.tile(row, (self.size, 1))
    return given(self, row, what)

Group.allgather_array = allgather_array
"""


@pytest.mark.parametrize("recovers", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_rank_that_skips_a_collective_ends_the_job(place, recovers):
    """Nobody holds the others up, all wait: a kill would change nothing. Long before comm.timeout_s."""
    begin = time.monotonic()
    found = place.faulty(SKIPS, "run", 3, *EVERY_TWO, SHORTLY, recovers=recovers)
    assert time.monotonic() - begin < SOON_S and found.code == 75, (found.err, found.out)
    waits = r"mlm-mpi: all 3 ranks wait in vain: rank 0, 2 for the losses of step 5; rank 1 for [^;]*"
    assert re.match(waits + "; the stacks of all: run/stacks: report this as a bug\n", found.err), found.err
    assert found.err.count("\n") <= 2 and "Traceback" not in found.err
    assert len(list((place.folder / "run" / "stacks").iterdir())) == 3


# each rank is alone on a node, which is this machine
ALONE = """
from mlm_mpi.comm.company import Company
inner_company = Company.__init__

def company(self, comm, node=None, recovers=False):
    inner_company(self, comm, comm.Split(comm.Get_rank()), recovers)

Company.__init__ = company
"""

STOPS = """
import signal

def before_step(rank, step):
    if rank == 1 and step == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_rank_that_is_stopped_alone_on_its_node_is_killed_by_its_lookout(place, home, straight):
    """And then the one that has become rank 1, by a new lookout."""
    found = place.faulty(ALONE + STOPS, "run", 3, *EVERY_TWO, recovers=True)
    undisturbed(place, home, straight, found)
    killed = r"mlm-mpi: rank {} did last, .* \(process \d+ on \S+, stopped\): killed, and the others go on\n"
    assert re.fullmatch(killed.format(1) + killed.format(2), found.err), found.err
    assert re.search(r"lookouts +3 nodes watch each other", found.out)


@pytest.mark.slow
def test_a_rank_that_stalls_alone_on_its_node_is_shown_by_its_lookout(place, home, straight):
    fault = ALONE + STALLS.format(how="spin", whose=OF_ONE)
    found = place.faulty(fault, "run", 3, *EVERY_TWO, SHORTLY, recovers=True)
    undisturbed(place, home, straight, found)
    assert re.match(r"mlm-mpi: rank 1 did last, .*; it was in spin .*: killed, and the others go on\n", found.err)
    assert [path.name for path in (place.folder / "run" / "stacks").iterdir()] == ["rank-1.txt"]


@pytest.mark.slow
def test_a_rank_that_stalls_alone_on_its_node_is_shown_where_the_job_cannot_go_on(place):
    found = place.faulty(ALONE + STALLS.format(how="spin", whose=OF_ONE), "run", 2, SHORTLY)
    assert found.code == 75 and found.err.count("\n") == 1, (found.code, found.err)
    assert re.match(r"mlm-mpi: rank 1 did last, .* it was in spin .*: run/stacks: start again to go on\n", found.err)
