"""Lookouts: who is heard, who is believed, what is said of a silent node, and what a lookout does to its own."""

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest

from mlm_mpi import signs
from mlm_mpi.comm import heartbeats, lookout
from mlm_mpi.comm.board import Board, Sign
from mlm_mpi.comm.heartbeats import Heartbeats, Silence
from mlm_mpi.comm.lookout import Lookout, Post, Waits, beat, is_awaited, silence
from mlm_mpi.comm.neighbours import Neighbours, Terms
from mlm_mpi.comm.processes import is_gone

TOKEN = "0" * 32


def sign(rank, waits=False, age_s=0.0, stopped=False, host="node1"):
    return Sign(rank, waits, age_s, "step 4, backward", 100 + rank, host, stopped)


# ---- rules


def test_a_node_is_looked_at_only_where_another_one_waits_and_nobody_of_its_own():
    idle, waiting = beat([sign(2)]), beat([sign(2), sign(3, waits=True)])
    assert is_awaited([sign(0), sign(1, stopped=True)], [idle, waiting])
    assert is_awaited([sign(0, waits=True, stopped=True)], [waiting]), "who was stopped while it waited does not wait"
    assert not is_awaited([sign(0)], [idle]) and not is_awaited([sign(0)], [])
    assert not is_awaited([sign(0), sign(1, waits=True)], [waiting]), "rank 1 looks"
    assert not is_awaited([sign(0)], [beat([sign(2, waits=True, age_s=60)])]), "nobody has renewed that sign"


def test_a_silent_node_is_named_with_its_ranks_and_what_they_did_last():
    beats = {1: beat([sign(rank, age_s=2, host="node7") for rank in range(2, 8)])}
    text = silence(beats, {1: 15.2}, [9, *range(1, 8)])
    assert text.startswith(
        "node7 is not heard for 15 s: rank 2 (process 102 on node7, last seen 17 s ago: step 4, backw"
    )
    assert text.count("last seen") == 4 and " and 2 more: its link is cut or its machine stands still: " in text
    assert text.endswith("start again to go on")


def test_silence_counts_in_time_in_which_this_process_ran():
    quiet = Silence()
    quiet.passed(0.25, [1, 2], [])
    for _ in range(10):
        quiet.passed(0.25, [2], [])
    assert quiet.longer_than(2.4) == {1: pytest.approx(2.5)} and quiet.heard_within(0.1) == [2]
    quiet.passed(3600.0, [], [])
    assert quiet.longer_than(2.4) == {1: pytest.approx(3.0)}, "I was suspended, and who knows who else"
    quiet.passed(0.25, [1], [])
    assert quiet.longer_than(0.6) == {2: pytest.approx(0.75)}
    quiet.passed(0.25, [], [2])
    assert quiet.known() == [1], "of a death MPI tells"
    assert 3 not in quiet.known(), "who has never spoken is not missed"


def test_a_wait_counts_from_the_last_move():
    waits = Waits()
    for _ in range(11):
        waits.passed(0.25, [sign(0)._replace(moves=3), sign(1, waits=True)])
    assert waits.longest_s() == pytest.approx(2.5)
    waits.passed(3600.0, [sign(0)._replace(moves=3), sign(1, waits=True)])
    assert waits.longest_s() == pytest.approx(3.0), "I was suspended, and who knows who else"
    waits.passed(0.25, [sign(0, waits=True)._replace(moves=3), sign(1, waits=True)._replace(moves=1)])
    assert waits.longest_s() == pytest.approx(0.25), "rank 1 has got on"
    waits.passed(0.25, [sign(0, waits=True, stopped=True), sign(1)])
    assert waits.longest_s() == 0


class Quiet:
    """The connections of node 1 of three, of which node 2 is heard once, and node 0 always."""

    node, gone = 1, frozenset()

    def __init__(self):
        self.beats = {2: beat([sign(1, host="node9")])}

    def turn(self):
        heard, self.beats = self.beats | {0: beat([sign(0, waits=True)])}, {}
        return heard

    def send(self, message):
        pass


@pytest.mark.parametrize(("waits", "ends"), [(True, True), (False, False)])
def test_a_silent_node_ends_nothing_while_my_ranks_do_not_wait(monkeypatch, capfd, waits, ends):
    """MPI may get on by another network. Who is not the lowest of those that hear each other speaks a little later."""
    near = Neighbours(board_of(of(7, waits=waits)), Terms(3, [0, 1], True, 5.0))
    killed, slept = [], []
    monkeypatch.setattr(near, "look", lambda: 0.25)
    monkeypatch.setattr(near, "kill", lambda signs, where: killed.extend(sign.process for sign in signs))
    monkeypatch.setattr(time, "sleep", slept.append)
    watching, turns = Lookout(near, Quiet()), 0
    try:
        while turns < 100:
            watching.turn()
            turns += 1
    except SystemExit:
        assert turns * 0.25 == pytest.approx(lookout._SILENT_S, abs=0.5)
    assert (killed, slept) == (([7], [1.0]) if ends else ([], []))
    assert capfd.readouterr().err.count("mlm-mpi: node9 is not heard for 15 s: rank 1 ") == ends


# ---- connections


def pair(tokens=(TOKEN, TOKEN)):
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in tokens]
    addresses = [listener.getsockname() for listener in listeners]
    made = [Heartbeats(n, token, listeners[n], addresses) for n, token in enumerate(tokens)]
    return made, addresses


def turns(hearts, number=40, message=b"w[]"):
    """What each of them hears in so many turns, in which all of them speak."""
    heard = [{} for _ in hearts]
    for _ in range(number):
        for n, one in enumerate(hearts):
            heard[n] |= one.turn()
            one.send(message + b"%d" % n)
        time.sleep(0.005)
    return heard


def test_two_nodes_hear_each_other_and_an_end_is_no_silence():
    (first, second), _ = pair()
    assert first.unconnected() == [1]
    assert turns([first, second]) == [{1: b"w[]1"}, {0: b"w[]0"}]
    assert first.unconnected() == second.unconnected() == []
    for line in [*second._lines.values()]:
        second._close(line)
    turns([first])
    assert first.gone == {1} and not second.gone


def test_who_does_not_know_the_token_is_neither_heard_nor_told_it():
    (first, second), addresses = pair((TOKEN, "1" * 32))
    assert turns([first, second]) == [{}, {}] and not first.gone
    with socket.create_connection(addresses[1]) as stranger:
        stranger.settimeout(5)
        stranger.sendall(struct.pack("!8s32sI", b"mlm-beat", b"x" * 32, 0))
        turns([second], 5)
        assert stranger.recv(1) == b"", "closed without a word"


def test_strangers_that_say_nothing_are_closed(monkeypatch):
    monkeypatch.setattr(heartbeats, "_STRANGER_S", 0.0)
    (_, second), addresses = pair()
    with socket.create_connection(addresses[1]) as stranger:
        stranger.settimeout(5)
        turns([second], 5)
        assert stranger.recv(1) == b""
    monkeypatch.undo()
    many = [socket.create_connection(addresses[1]) for _ in range(80)]
    turns([second], 90)
    assert len(second._strangers) == 64
    for stranger in many:
        stranger.close()


def test_a_message_that_is_too_long_to_be_ours_ends_the_connection_not_the_lookout():
    (first, second), _ = pair()
    turns([first, second])
    second._lines[0].push(struct.pack("!I", 1 << 31))
    turns([first, second], 5)
    assert not first._lines and not first.gone


def test_who_does_not_read_misses_messages_and_never_a_part_of_one():
    (first, second), _ = pair()
    turns([first, second])
    for _ in range(400):
        first.send(b"w" + b"x" * 100_000)
    assert len(first._lines[1]._out) <= 100_008, "nothing piles up"
    heard = set()
    for _ in range(2000):
        heard |= {*second.turn().values()}
        first.send(b"w[]")
        if b"w[]" in heard:
            break
    assert heard == {b"w" + b"x" * 100_000, b"w[]"}


# ---- the process


def board_of(*signs):
    """A board as a node has it, on which `signs` stand."""
    descriptor = os.memfd_create("signs")
    os.ftruncate(descriptor, 256 * len(signs))
    for place, one in enumerate(signs):
        shown = [one.rank, one.process, one.waits, one.moves, one.longest_s, one.step, one.micro, one.stacks, False]
        Board(descriptor, len(signs), place).show(3, one.text, *shown)
    return Board(descriptor, len(signs))


STARTER = f"""
import socket, sys, time
from mlm_mpi.comm.board import Board
from mlm_mpi.comm.lookout import Post
from mlm_mpi.comm.neighbours import Neighbours, Terms

board, port, recovers = map(int, sys.argv[1:])
near = Neighbours(Board(board, 1), Terms(3, [7, 8], bool(recovers), 5.0))
mine = socket.create_server(("127.0.0.1", 0))
post = Post.taken(near, 0, "{TOKEN}", [mine.getsockname(), ("127.0.0.1", port)], mine)
print(post._process.pid, flush=True)
time.sleep(1000)
"""


@pytest.fixture
def victim():
    """A process that may be killed, in place of the rank of a node."""
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def manned():
    """Starts a lookout for a board: (the process that has started it, its number, the other node that it talks to)."""
    ranks, lookouts = [], []

    def start(board, recovers):
        mine = socket.create_server(("127.0.0.1", 0))
        words = [sys.executable, "-c", STARTER, board.descriptor, mine.getsockname()[1], int(recovers)]
        rank = subprocess.Popen(
            [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            pass_fds=[board.descriptor], env=os.environ | {signs.VARIABLE: "x"},
        )  # fmt: skip
        ranks.append(rank)
        lookouts.append(int(rank.stdout.readline()))
        return rank, lookouts[-1], Heartbeats(1, TOKEN, mine, [None, None])

    yield start
    for rank, process in zip(ranks, lookouts, strict=True):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)  # one that outlives its rank would hold its stderr
        rank.kill()
        rank.communicate()


def until(found, hearts, message, limit_s=60):
    """Speaks until something is so."""
    end = time.monotonic() + limit_s
    while not found():
        assert time.monotonic() < end
        hearts.turn()
        hearts.send(message)
        time.sleep(0.02)


def of(process, waits=False, **more):
    return Sign(0, waits, 0.0, "step 4, backward", process, "", False, **more)


def test_a_stopped_rank_is_killed_while_another_node_waits_and_not_before(victim, manned):
    rank, _, other = manned(board_of(of(victim.pid)), True)
    victim.send_signal(signal.SIGSTOP)
    idle, waits = beat([sign(1)]), beat([sign(1, waits=True)])
    heard = []
    until(lambda: heard.extend(other.turn().values()) or len(heard) >= 8, other, idle)
    assert victim.poll() is None and json.loads(heard[-1][1:])[0][1:6:3] == [False, victim.pid]
    until(lambda: victim.poll() is not None, other, waits)
    rank.kill()
    assert re.fullmatch(
        r"mlm-mpi: rank 7 did last, \d+ s ago: step 4, backward \(process \d+ on \S+, stopped\): killed, and the "
        r"others go on\n", rank.communicate()[1],
    )  # fmt: skip


def test_a_stopped_rank_may_be_continued_where_its_end_would_be_the_jobs(victim, manned):
    _, _, other = manned(board_of(of(victim.pid)), False)
    victim.send_signal(signal.SIGSTOP)
    heard = []
    until(lambda: heard.extend(other.turn().values()) or len(heard) >= 8, other, beat([sign(1, waits=True)]))
    assert victim.poll() is None


def test_one_that_stalls_ends_a_job_that_does_not_recover_by_one_line_and_a_word_to_the_launcher(victim, manned):
    rank, _, other = manned(board_of(of(victim.pid, longest_s=0.01)), False)
    until(lambda: victim.poll() is not None, other, beat([sign(1, waits=True)]))
    rank.kill()
    line, word = rank.communicate()[1].splitlines()
    assert line.endswith("which took it 0.01 s at most before: start again to go on")
    assert word == "\x02mlm-mpi end over 75"


@pytest.mark.slow  # it waits; test-slurm cuts a link
def test_a_node_that_falls_silent_ends_mine(victim, manned):
    """Its other side is there, and says nothing any more."""
    rank, process, other = manned(board_of(of(victim.pid, waits=True)), True)
    last = beat([sign(1, waits=True, host="node9")])
    heard = []
    until(lambda: heard.extend(other.turn().values()) or len(heard) >= 2, other, last)
    begin = time.monotonic()
    assert victim.wait(60) == -signal.SIGKILL
    assert time.monotonic() - begin > 0.9 * lookout._SILENT_S
    while is_there(process):
        assert time.monotonic() - begin < 60
        time.sleep(0.05)
    rank.kill()
    line, word = rank.communicate()[1].splitlines()
    assert re.match(
        r"mlm-mpi: node9 is not heard for \d+ s: rank 8 \(process 101 on node9, last seen \d+ s ago: wa", line
    )
    assert word == "\x02mlm-mpi end over 75"


def test_a_lookout_dies_with_the_rank_that_has_started_it_and_by_no_signal_of_slurm(victim, manned):
    rank, process, other = manned(board_of(of(victim.pid)), True)
    heard = []
    until(lambda: heard.extend(other.turn().values()) or len(heard) >= 2, other, b"-[]")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        os.kill(process, number)
    until(lambda: heard.extend(other.turn().values()) or len(heard) >= 4, other, b"-[]")
    assert is_there(process)
    rank.kill()
    until(lambda: not is_there(process), other, b"-[]", 20)
    until(lambda: other.gone == {0}, other, b"-[]")
    assert rank.communicate()[1] == "" and victim.poll() is None


def is_there(process):
    return not is_gone(process)


def test_a_lookout_needs_no_mpi_and_no_numpy():
    code = "import sys, mlm_mpi.comm.lookout; print([name for name in ('numpy', 'mpi4py') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_a_lookout_that_cannot_be_started_is_one_line(monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    near = Neighbours(board_of(of(1)), Terms(3, [0], True, 5.0))
    with socket.create_server(("127.0.0.1", 0)) as mine:
        post = Post.taken(near, 0, TOKEN, [mine.getsockname(), ("127.0.0.1", 1)], mine)
    post.close()
    monkeypatch.setattr(lookout, "_own_address", lambda: "203.0.113.1")  # nobody's (RFC 5737)
    assert lookout.listening() is None
    first, second = capfd.readouterr().err.splitlines()
    for line in (first, second):
        assert line.startswith("mlm-mpi: warning: no lookout on ") and line.endswith("found after comm.timeout_s")
    assert "(No such file or directory)" in first


def test_a_job_of_one_node_has_none():
    near = Neighbours(board_of(of(1)), Terms(3, [0], True, 5.0))
    with socket.create_server(("127.0.0.1", 0)) as mine:
        post = Post.taken(near, 0, TOKEN, [mine.getsockname(), None], mine)
    assert post.nodes == 0 and post._process is None
