"""The terminal of `mlm-mpi run`: text runs above one line, whatever comes in which pieces."""

import os

import pytest
from terminal import COLUMNS, Screen

from mlm_mpi.monitor import live, screen
from mlm_mpi.monitor.live import Shown

HALF = Shown("step", 5, 10, "loss 3.2 [not markup]")


@pytest.fixture
def seen(monkeypatch) -> Screen:
    """What the person sees of both streams."""
    terminal = Screen()

    def write(descriptor: int, data: bytes) -> int:
        terminal.feed(data.replace(b"\n", b"\r\n"))
        return len(data)

    monkeypatch.setattr(screen.os, "write", write)
    monkeypatch.setattr(screen.os, "isatty", lambda descriptor: True)
    monkeypatch.setattr(screen.os, "get_terminal_size", lambda descriptor: os.terminal_size((COLUMNS, 40)))
    return terminal


def test_lines_run_above_the_foot_and_it_is_gone_at_the_end(seen):
    drawn = screen.Screen(True)
    drawn.write(1, b"the plan\n")
    drawn.show(HALF.encode())
    assert seen.lines == ["the plan", "step ━━━━━━━━━━╺━━━━━━━━━ loss 3.2 [not markup]"]
    drawn.write(2, b"ALARM one\n")
    drawn.write(1, "halves of a letter: ä".encode()[:-1])
    assert seen.lines[:2] == ["the plan", "ALARM one"] and seen.lines[2].startswith("halves of a letter:")
    drawn.write(1, "ä".encode()[1:])
    drawn.show(Shown("step", 6, 10, "not behind half a line").encode())
    drawn.say("stopping")
    assert seen.lines[2:4] == ["halves of a letter: ä", "mlm-mpi run: stopping"]
    assert seen.lines[4].endswith("not behind half a line")
    drawn.close()
    assert seen.lines == ["the plan", "ALARM one", "halves of a letter: ä", "mlm-mpi run: stopping"]


def test_the_foot_is_never_wider_than_the_terminal(seen):
    drawn = screen.Screen(True)
    for number in range(3):
        drawn.show(Shown("step", number, 3, f"{number} " + "wide ä " * 100).encode())
    assert len(seen.lines) == 1 and seen.lines[0].startswith("step"), seen.lines


def test_without_a_terminal_bytes_pass_untouched(seen):
    plain = screen.Screen(False)
    plain.show(HALF.encode())
    plain.write(1, b"half a line")
    plain.say("stopping")
    assert seen.raw == b"half a linemlm-mpi run: stopping\r\n"


def test_a_log_beside_the_terminal_gets_what_is_said_and_nothing_else(seen, monkeypatch):
    monkeypatch.setattr(screen.os, "isatty", lambda descriptor: descriptor == 1)
    written: list[tuple[int, bytes]] = []
    monkeypatch.setattr(screen.os, "write", lambda descriptor, data: written.append((descriptor, data)) or len(data))
    drawn = screen.Screen(True)
    drawn.show(HALF.encode())
    drawn.write(1, b"half a line")
    drawn.write(2, b"ALARM\n")
    drawn.say("stopping")
    assert b"".join(data for descriptor, data in written if descriptor == 2) == b"ALARM\nmlm-mpi run: stopping\n"


@pytest.mark.parametrize(
    "text", ["", "null", "{", "[1]", '{"what": 1, "done": 0, "total": 1, "text": ""}',
             '{"what": "", "done": NaN, "total": 1, "text": ""}', '{"done": 1}', "[" * 5000],
)  # fmt: skip
def test_a_sign_that_means_nothing_draws_nothing(seen, text):
    drawn = screen.Screen(True)
    drawn.show(text)
    assert seen.raw == b""


def test_a_rank_tells_its_launcher_and_not_too_often(capfd, monkeypatch):
    monkeypatch.setenv(live.TERMINAL, "1")
    monkeypatch.setenv("MLM_MPI_LAUNCHER", "1 here pid:[1]")
    bar = live.live("step")
    assert bar.drawn
    for done in range(1000):
        bar.update(done, 999, "text\nof two lines")
    bar.line("a lasting line")
    bar.close()
    out, err = capfd.readouterr()
    assert out == "a lasting line\n"
    first, *_, last, closed, end = err.split("\n")
    assert Shown.decode(first.split(" ", 2)[2]) == Shown("step", 0, 999, "text\nof two lines")
    assert Shown.decode(last.split(" ", 2)[2]) == Shown("step", 999, 999, "text\nof two lines"), "the last is seen"
    assert (closed, end) == ("\x02mlm-mpi show ", "")
    assert err.count("\n") < 20


@pytest.mark.parametrize(("done", "total"), [(0, 0), (5, 0), (-1, 3), (1e300, 1e-300), (7, 3)])
def test_odd_numbers_are_drawn_and_do_not_end_the_launcher(seen, done, total):
    drawn = screen.Screen(True)
    drawn.show(Shown("step", done, total, "text \x1b[2J\n of two lines").encode())
    assert len(seen.lines) == 1 and seen.lines[0].startswith("step"), seen.lines


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_dumb_terminal_is_not_drawn_on(monkeypatch, term):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", term)
    assert live.can_draw() == (term == "xterm")
