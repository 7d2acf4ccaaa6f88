"""What the kernel says of other processes of this machine: the `stat` files of proc(5)."""

import os
from pathlib import Path
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")
_STATE, _USER, _SYSTEM = 0, 11, 12  # places behind the name


class Effort(NamedTuple):
    """What a process has done so far."""

    cpu_s: float  # of all its threads
    asleep: bool  # all of them


def effort(process: int) -> Effort:
    """0 s, awake, where the kernel says nothing: the process, or one of its threads, ends just now."""
    try:
        fields = _stat(f"/proc/{process}")
        asleep = all(_stat(thread)[_STATE] == "S" for thread in Path(f"/proc/{process}/task").iterdir())
        return Effort((int(fields[_USER]) + int(fields[_SYSTEM])) / _TICKS, asleep)
    except (OSError, IndexError):
        return Effort(0.0, False)


def is_stopped(process: int) -> bool:
    """Whether somebody has sent it SIGSTOP."""
    try:
        return _stat(f"/proc/{process}")[_STATE] == "T"
    except (OSError, IndexError):
        return False


def is_gone(process: int) -> bool:
    """Whether it has ended, waited for or not."""
    try:
        return _stat(f"/proc/{process}")[_STATE] in "ZX"
    except (OSError, IndexError):
        return True


def _stat(folder: str | Path) -> list[str]:
    """What stands behind the name, which is in brackets and may hold brackets and blanks."""
    with open(f"{folder}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].decode().split()
