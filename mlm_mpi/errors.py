"""One exception tree. Each message is one line: the value, the bound, the remedy.

`comm.launch.supervise` prints an `MlmError` as that one line and exits with code 2; anything else is a
bug and shows its traceback.
"""

import difflib
from collections.abc import Iterable, Sequence

_LONGEST = 2000  # characters of a message


class MlmError(Exception):
    """Something the user can mend; printed as one line, exit code 2.

    `agreed` is True where every rank of the job raises it together: rank 0 alone prints, nobody aborts.
    """

    exit_code = 2
    agreed = False

    def __str__(self) -> str:
        """One line of bounded length, whatever a quoted file name or value holds."""
        text = super().__str__()
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:_LONGEST])
        return line if len(text) <= _LONGEST else line + "…"


def agreed(error: MlmError) -> MlmError:
    """The same error, marked as one that every rank raises together."""
    error.agreed = True
    return error


class ConfigError(MlmError):
    """A key, value or combination of values in the configuration that cannot work."""


class DataError(MlmError):
    """Input text, a shard or a catalog that is missing, damaged or of another making."""


class StorageError(DataError):
    """A file that cannot be written: a full disk, a folder without permission."""


class CheckpointError(MlmError):
    """A checkpoint that is torn, corrupt or of another model, or one that cannot be written."""


class NumericsError(MlmError):
    """A loss or gradient that is not finite; raised before any update."""


class CommError(MlmError):
    """A wait on other ranks that lasted too long: worth another start (EX_TEMPFAIL of sysexits).

    `teller`: the rank that is to say it, where several have found the same; None: whoever raises it.
    """

    exit_code = 75

    def __init__(self, text: str, teller: int | None = None) -> None:
        super().__init__(text)
        self.teller = teller


class PeerLost(CommError):
    """A rank has died while others counted on it. `agreed`: every rank that lives raises it at this agreement."""


class LaunchError(MlmError):
    """`mpiexec` cannot be found or started, or gave another number of ranks than was asked for."""


def ranges(numbers: Sequence[int], most: int = 8) -> str:
    """[0, 1, 2, 5] -> "0-2, 5", for a message; after `most` runs an ellipsis."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(texts[:most]) + (", …" if len(texts) > most else "")


def nearest(name: str, known: Iterable[str], every: bool = True) -> str:
    """What follows an unknown name in a message: the nearest one that is known, else (`every`) all of them."""
    names = sorted(known)
    lower = {known.lower(): known for known in reversed(names)}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {lower[near[0]]!r}?"
    return f"; known: {', '.join(names)}" if every else ""
