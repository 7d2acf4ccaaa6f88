"""What nobody needs to read of a job that fails, taken out of its stderr: Open MPI's own words, and echoes of ranks."""

import re
from collections.abc import Callable

_NBC = b"NBC_Progress: an error "


class BannerFilter:
    """Passes stderr on byte for byte, but for what Open MPI says of itself when a rank failed.

    That is blocks that open and close with 60 or more dashes, the zero byte after the last block, and lines of
    PMIX errors. Bytes are held back only as long as they may become such. `on_death` gets rank and signal of a
    rank that a block says has died, `on_loss` the name of a node that it says is lost, or what srun said of it.
    """

    _KNOWN = (
        b"prterun detected that one or more",
        b"prterun noticed that process",
        b"prterun has exited due to process",
        b"mpirun detected that one or more",
        b"mpirun noticed that process",
        b"mpirun has exited due to process",
        b"mpiexec detected that one or more",
        b"mpiexec noticed that process",
        b"mpiexec has exited due to process",
        b"MPI_ABORT was invoked on rank",
        b"Primary job  terminated normally",
        b"PRTE has lost communication with a remote daemon",
        b"ORTE has lost communication with a remote daemon",
        b"srun returned non-zero exit status (",
    )
    _BLOCK = re.compile(rb"-{60,}\n.*?\n-{60,}\n", re.DOTALL)
    _DEATH = re.compile(rb"process rank (\d+) with PID \d+ on node \S+\s+exited\s+on\s+signal\s+(\d+)")
    _LOSS = re.compile(rb"Remote daemon: \S+ on node (\S+)")
    _SRUN = re.compile(rb"srun returned non-zero exit status \((\d{1,9})\)")  # as wait() gives it
    _LAST = re.compile(rb"-{74}\n")  # Open MPI's closing line; a zero byte may follow

    # what the launcher's own parts say to each other when ranks leave while they still talk (seen in 1 of 20 ends)
    # (PMIX ERROR), and what its event loop says of a socket that they have closed (Epoll, 1 of 40 ends)
    # and what collectives that a death has ended say of it, with an empty line (NBC_Progress)
    _NOISE = re.compile(rb"\[[^\]\n]+\] (PMIX ERROR: |Epoll MOD\()[^\n]*\n|NBC_Progress: an error [^\n]*\n")

    def __init__(self, on_death: Callable[[int, int], None], on_loss: Callable[[str], None]) -> None:
        self.passed = False  # whether anything was said that the user sees
        self._on_death, self._on_loss = on_death, on_loss
        self._held = b""
        self._inside_line = False
        self._after_block = False
        self._owed = 0  # empty lines that belong to noise, which ranks write between each other's

    def feed(self, data: bytes) -> bytes:
        """What may be shown now that `data` has arrived."""
        self._held += data
        out = b""
        while self._held:
            if self._after_block and self._held[:1] == b"\0":
                self._held = self._held[1:]
            elif self._owed and not self._inside_line and self._held[:1] == b"\n":
                self._held, self._owed = self._held[1:], self._owed - 1
            elif not self._inside_line and self._may_be_block():
                block = self._BLOCK.match(self._held)
                if block is None:
                    break
                self._drop(block)
            elif not self._inside_line and self._may_be_noise():
                noise = self._NOISE.match(self._held)
                if noise is None:
                    break
                self._owed += noise[0].startswith(_NBC)
                self._held = self._held[noise.end() :]
            else:
                out += self._pass_line()
        return out

    def close(self) -> bytes:
        """What was still held back at the end."""
        out, self._held = self._held, b""
        return out

    def _may_be_block(self) -> bool:
        dashes, newline, rest = self._held.partition(b"\n")
        if dashes.strip(b"-"):
            return False
        if not newline:
            return True
        return len(dashes) >= 60 and any(rest.startswith(known) or known.startswith(rest) for known in self._KNOWN)

    def _may_be_noise(self) -> bool:
        if self._held.startswith(_NBC) or _NBC.startswith(self._held):
            return True
        host, bracket, rest = self._held.partition(b"] ")
        if not host.startswith(b"[") or b"\n" in host or len(host) > 200:
            return False
        marks = (b"PMIX ERROR: ", b"Epoll MOD(")
        return not bracket or any(rest.startswith(mark) or mark.startswith(rest) for mark in marks)

    def _drop(self, block: re.Match[bytes]) -> None:
        self._held = self._held[block.end() :]
        self._after_block = True
        self.passed |= self._reported(block[0])

    def _reported(self, block: bytes) -> bool:
        if death := self._DEATH.search(block):
            self._on_death(int(death[1]), int(death[2]))
        elif loss := self._LOSS.search(block):
            self._on_loss(loss[1].decode(errors="replace"))
        elif srun := self._SRUN.search(block):
            self._on_loss(f"a node: srun ended with {int(srun[1]) >> 8}")
        else:
            return False
        return True

    def _pass_line(self) -> bytes:
        line, newline, self._held = self._held.partition(b"\n")
        self._after_block = not self._inside_line and self._LAST.fullmatch(line + newline) is not None
        self._inside_line = not newline
        self.passed = True
        return line + newline


class EchoFilter:
    """Passes stderr on, but for a line of `mlm-mpi` that another rank has said before in the same words.

    Before MPI is up ranks cannot agree on who speaks: what all of them find, each says. MPICH's launcher, other than
    Open MPI's, lets them.
    """

    _START = b"mlm-mpi: "
    _LINE = re.compile(_START + rb"(?:rank \d+: )?(.*)\n")
    _MOST = 1000  # lines that are remembered; a job that fails has few

    def __init__(self) -> None:
        self._said: set[bytes] = set()
        self._held = b""
        self._inside_line = False

    def feed(self, data: bytes) -> bytes:
        """What may be shown now that `data` has arrived; a line of ours only as a whole."""
        self._held += data
        out = b""
        while self._held:
            ours = not self._inside_line and self._START.startswith(self._held[: len(self._START)])
            line, newline, rest = self._held.partition(b"\n")
            if ours and not newline:
                break
            self._held, self._inside_line = rest, not newline
            said = self._LINE.fullmatch(line + newline) if ours else None
            if said is None or self._is_new(said[1]):
                out += line + newline
        return out

    def close(self) -> bytes:
        """What was still held back at the end."""
        out, self._held = self._held, b""
        return out

    def _is_new(self, text: bytes) -> bool:
        if text in self._said:
            return False
        if len(self._said) < self._MOST:
            self._said.add(text)
        return True
