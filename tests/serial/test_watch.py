"""Who has stalled: decided from signs and from what the kernel says; no rank that is healthy, however little
of a core it has."""

import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm_mpi.comm import stacks
from mlm_mpi.comm.processes import Effort, effort, is_stopped
from mlm_mpi.comm.watch import Pace, Seen, Watch, wait_kind

LOOK_S = 0.25


def looks_until_found(efforts, longest_s=0.1, least_s=5.0, since_s=LOOK_S):
    """So many looks until a rank that shows these efforts is found to have stalled; None: never."""
    watch = Watch(least_s)
    for number, shown in enumerate(efforts):
        if watch.stalled([Seen(7, 1, longest_s, shown)], since_s):
            return number
    return None


def busy(share, looks=4000):
    return [Effort(100 + LOOK_S * share * number, False) for number in range(looks)]


ASLEEP = [Effort(3.0, True)] * 4000


def test_nothing_is_known_before_the_third_time_and_the_first_does_not_count():
    pace = Pace()
    found = []
    for seconds in (60.0, 0.2, 0.1, 0.3):
        pace.took("forward", seconds)
        found.append(pace.longest_s("forward"))
    assert found == [0, 0, 0.2, 0.3] and pace.longest_s("backward") == 0


def test_waits_that_differ_by_a_step_are_of_one_kind():
    assert wait_kind("the losses of step 12") == wait_kind("the losses of step 7") != wait_kind("gradients of step 7")


def test_an_endless_loop_is_found_after_the_least_time_or_ten_times_the_longest():
    assert looks_until_found(busy(1.0)) * LOOK_S == pytest.approx(5, abs=LOOK_S)
    assert looks_until_found(busy(1.0), longest_s=2.0) * LOOK_S == pytest.approx(20, abs=LOOK_S)
    assert looks_until_found(busy(8.0)) == looks_until_found(busy(1.0)), "threads do not make it older"


def test_one_that_sleeps_is_found_in_twice_the_time():
    assert looks_until_found(ASLEEP) * LOOK_S == pytest.approx(10, abs=LOOK_S)


def test_time_without_a_core_does_not_count():
    assert looks_until_found(busy(0.0)) is None, "ready to run, or at a disk, or stopped"
    assert looks_until_found(busy(0.05)) * LOOK_S == pytest.approx(100, abs=LOOK_S)


def test_a_job_that_was_suspended_as_a_whole_loses_half_a_second():
    assert looks_until_found([Effort(1.0, True), Effort(9999.0, True)], since_s=9999.0) is None
    assert looks_until_found(ASLEEP, since_s=9999.0) == 21


def test_a_rank_that_has_noted_something_begins_anew():
    watch = Watch(5.0)
    for number in range(4000):
        shown = Effort(LOOK_S * number, False)
        assert not watch.stalled([Seen(7, number // 16, 0.1, shown)], LOOK_S), "four seconds each"


@given(
    st.floats(0.01, 30), st.floats(0.05, 20), st.lists(st.tuples(st.floats(0.2, 60), st.floats(0, 1)), max_size=60),
    st.integers(1, 9),
)  # fmt: skip
def test_no_healthy_rank_is_found_however_it_is_starved(longest_s, least_s, looks, slower):
    """It is through with its work after up to nine times the core time of its slowest ever, whatever the clock says."""
    watch, cpu_s = Watch(least_s), 50.0
    for since_s, share in looks:
        if cpu_s - 50 >= slower * longest_s:
            break
        cpu_s = min(cpu_s + since_s * share, 50 + slower * longest_s)
        assert not watch.stalled([Seen(7, 1, longest_s, Effort(cpu_s, False))], since_s)


def test_all_wait_in_vain_only_while_all_poll_and_nothing_moves():
    watch = Watch(5.0)
    assert not any(watch.stands_still([1, 2], 0.1, brisk=False, since_s=LOOK_S) for _ in range(4000))
    assert not any(watch.stands_still([1, number // 30], 0.1, brisk=True, since_s=LOOK_S) for number in range(4000))
    found = [watch.stands_still([5, 5], 0.1, brisk=True, since_s=LOOK_S) for _ in range(100)]
    assert found.index(True) * LOOK_S == pytest.approx(10, abs=LOOK_S)
    assert not any(watch.stands_still([6, 5], 2.0, brisk=True, since_s=LOOK_S) for _ in range(160))


# ---- what the kernel says


def started(code):
    """A process that runs `code`, once it has said a line; the line."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


SPIN = "import itertools, collections\ndef spin():\n  collections.deque(itertools.repeat(0), 0)\n"
SLEEP = "import time\ndef hold():\n  time.sleep(99)\n"
REGISTER = "from mlm_mpi.comm import stacks\nprint(stacks.register(), flush=True)\n"


def test_the_kernel_tells_busy_from_asleep_and_stopped():
    busy, _ = started(SPIN + "print(flush=True)\nspin()")
    idle, _ = started(SLEEP + "print(flush=True)\nhold()")
    try:
        time.sleep(0.3)
        before = effort(busy.pid).cpu_s
        end = time.monotonic() + 20
        while effort(busy.pid).cpu_s < before + 0.1 and time.monotonic() < end:
            assert not effort(busy.pid).asleep
            time.sleep(0.02)
        assert time.monotonic() < end
        assert effort(idle.pid).asleep and not is_stopped(idle.pid)
        idle.send_signal(signal.SIGSTOP)
        while not is_stopped(idle.pid):
            time.sleep(0.01)
        assert not effort(idle.pid).asleep, "who is stopped is not counted as stalled"
    finally:
        for process in (busy, idle):
            process.kill()
            process.communicate()
    assert effort(busy.pid) == (0.0, False) and not is_stopped(busy.pid)


# ---- stacks


def test_stacks_of_a_loop_in_c_of_a_sleeper_and_of_one_that_is_stopped():
    spins, first = started(REGISTER + SPIN + "spin()")
    sleeps, second = started(REGISTER + SLEEP + "hold()")
    stopped, third = started(REGISTER + SLEEP + "hold()")
    other, _ = started("import os\n" + SLEEP + "os.memfd_create('x')\nprint(flush=True)\nhold()")
    processes = {spins.pid: int(first), sleeps.pid: int(second), stopped.pid: int(third), other.pid: int(first)}
    try:
        stopped.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        begin = time.monotonic()
        found = stacks.of(processes)
        assert time.monotonic() - begin < 5, "it does not wait for the one that is stopped for ever"
        assert found.keys() == {spins.pid, sleeps.pid}
        assert stacks.innermost(found[spins.pid]) == "spin (<string>:5) < <module> (<string>:6)"
        assert stacks.innermost(found[sleeps.pid]) == "hold (<string>:5) < <module> (<string>:6)"
        again = stacks.of({sleeps.pid: int(second)})
        assert again[sleeps.pid].count("in hold") == 1, "what was asked for before is not shown again"
        assert other.poll() is None, "who has not registered is not signalled: it would die of it"
    finally:
        for process in (spins, sleeps, stopped, other):
            process.kill()
            process.communicate()


def test_the_innermost_frames_are_those_of_the_main_thread():
    text = (
        'Thread 0x1 (most recent call first):\n  File "/a/loader.py", line 3 in _walk\n\n'
        'Current thread 0x2 (most recent call first):\n  File "/a/b.py", line 1 in f\n'
        '  File "/a/c d.py", line 2 in g h\n'
    )
    assert stacks.innermost(text) == "f (b.py:1) < g h (c d.py:2)"
    assert stacks.innermost("") == stacks.innermost("It did not answer.\n") == ""


def test_nobody_is_left_with_a_file():
    descriptor = stacks.register()
    assert "(deleted)" in str(Path(f"/proc/self/fd/{descriptor}").readlink())
    assert "test_nobody_is_left_with_a_file" in stacks.of({os.getpid(): descriptor})[os.getpid()]
    faulthandler.unregister(signal.SIGUSR2)
    os.close(descriptor)
