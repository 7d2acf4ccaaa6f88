"""The program's own stdout: whole when the program starts, and never the reason why a training ends."""

import io
import os
import select
import sys

from mlm_mpi.errors import StorageError

_HELD_BYTES = 8192


def open_streams(patient: bool) -> None:
    """Makes stdin, stdout and stderr usable, however the program was started; stdout becomes an `Output`.

    A closed one becomes /dev/null: the next file to be opened would take its number, and what is printed with it.
    A character that the terminal's encoding lacks is shown as "?".
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or open(0, encoding="utf-8")  # noqa: SIM115  (open until the end)
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="replace")
    sys.stdout = Output(1, sys.stdout.encoding if sys.stdout else "utf-8", patient)


class Output(io.TextIOBase):
    """Text to a descriptor that may fail, as on a full disk.

    `patient`: the first failure is an alarm on stderr, lines are lost until writing works again, and the program goes
    on. Otherwise a failure is a StorageError, once. A reader that has left (`| head`) stays a BrokenPipeError.
    """

    def __init__(self, descriptor: int, encoding: str, patient: bool) -> None:
        self._descriptor, self._encoding, self._patient = descriptor, encoding, patient
        self._at_once = os.isatty(descriptor)
        self._held = b""
        self._failed = False

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute there
        return self._encoding

    @property
    def errors(self) -> str:  # type: ignore[override]  # a plain attribute there
        """`input` edits lines of a terminal only where it is told."""
        return "replace"

    def isatty(self) -> bool:
        return self._at_once

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Takes text; lines leave at once on a terminal, else when there are some KiB. Raises StorageError."""
        self._held += text.encode(self._encoding, errors="replace")
        if len(self._held) > _HELD_BYTES or (self._at_once and "\n" in text):
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Writes what is held; what cannot be written is forgotten. Raises StorageError unless patient."""
        data, self._held = self._held, b""
        try:
            while data:
                try:
                    data = data[os.write(self._descriptor, data) :]
                except BlockingIOError:  # a pipe that somebody made non-blocking
                    select.select([], [self._descriptor], [])
        except BrokenPipeError:
            raise
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if self._failed:
            return
        self._failed = True
        text = f"cannot write to stdout ({error.strerror}): free space there or send it elsewhere"
        if not self._patient:
            raise StorageError(text) from None
        sys.stderr.write(f"mlm-mpi: ALARM {text}; the run goes on without its lines\n")
        sys.stderr.flush()
