"""`make gpu-check` without a GPU: its cases fit the kernels, its workers may hang and die, and all of it runs dry."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cupy
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_cases  # noqa: E402
import gpu_check  # noqa: E402
import gpu_workers  # noqa: E402

from mlm_mpi.backend import choice  # noqa: E402
from mlm_mpi.backend.cuda.provider import KERNELS  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("MLM_MPI_TEST_GPU") == "1", reason="gpu_check.py itself runs on the GPU")


@pytest.fixture(scope="module")
def library():
    """The device, while references compute everything."""
    yield choice.select(reference="all", device="cuda").first.library
    choice.select()


def test_every_case_fits_a_kernel(library, dtype):
    for case in gpu_cases.cases(gpu_cases.SMALL, dtype):
        arguments = case.make(gpu_cases.Bank(cupy, 1, 1 << 10))
        mine = [kernel for kernel in KERNELS[case.function] if not kernel.lacks(library)]
        assert "" in [kernel.contract(*arguments) for kernel in mine], (case.function, case.name)


def test_the_same_seed_gives_the_same_arrays():
    one, same, other = (gpu_cases.Bank(cupy, seed, 1 << 10).normal(50, 60).get() for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()
    assert abs(one.std() - 1) < 0.1


FAKE_WORKER = """
import json, os, sys, time

def say(**line):
    print(json.dumps(line), flush=True)

job = json.loads(sys.argv[1])
rows = [0, 1, 2, 3] if job["rows"] is None else job["rows"]
say(rows=rows, without_case=[], architecture="sm_90a")
for row in rows:
    for variant in ("good", "bad"):
        if f"{row} {variant}" in job["skip"]:
            continue
        say(row=row, begin=variant)
        if variant == "bad" and row == 1:
            time.sleep(60)
        if variant == "bad" and row == 2:
            print("an illegal address", file=sys.stderr, flush=True)
            os._exit(9)
    say(row=row, case="a case", variants={})
"""


def test_a_variant_that_hangs_or_dies_costs_itself_only(tmp_path, monkeypatch):
    (tmp_path / "gpu_kernels.py").write_text(FAKE_WORKER)
    for name, value in (("HERE", tmp_path), ("WORK", tmp_path), ("SILENCE_S", 1.0)):
        monkeypatch.setattr(gpu_workers, name, value)
    drive = gpu_workers.Drive(lambda **more: os.environ | more, {}, "fake").run(time.monotonic() + 30)
    assert sorted(drive.rows) == [0, 1, 2, 3] and drive.pending == []
    assert drive.dead == {"1 bad": "hung, was killed", "2 bad": "exit code 9: an illegal address"}


def test_a_worker_that_never_starts_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "gpu_kernels.py").write_text("raise ImportError('no CuPy')")
    for name in ("HERE", "WORK"):
        monkeypatch.setattr(gpu_workers, name, tmp_path)
    drive = gpu_workers.Drive(lambda **more: os.environ | more, {}, "fake").run(time.monotonic() + 30)
    assert drive.pending is None and not drive.rows and "no CuPy" in drive.words


@pytest.mark.parametrize(("cublas", "faster"), [(9.0, "bfloat16 4x4x4 nn"), (9.9, ""), (11.0, "")])
def test_what_cublas_does_faster(cublas, faster):
    variants = {"cuBLAS": {"kind": "peer", "us": cublas}, "plain": {"kind": "ours", "us": 50.0}}
    variants |= {"hopper": {"kind": "ours", "us": 10.0}, "mma": {"kind": "ours", "failed": "wrong"}}
    assert gpu_check._faster_by_cublas({"variants": variants, "cublas_case": "bfloat16 4x4x4 nn"}) == faster


FAKE_TESTS = """
import time

def test_good():
    pass

def test_bad():
    assert False

def test_hangs():
    time.sleep(60)

def test_behind_it():
    pass
"""


def test_a_test_that_hangs_costs_itself_only(tmp_path, monkeypatch):
    (tmp_path / "tests" / "cuda").mkdir(parents=True)
    (tmp_path / "test_fake.py").write_text(FAKE_TESTS)
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    for name, value in (("ROOT", tmp_path), ("SILENCE_S", 3.0)):
        monkeypatch.setattr(gpu_workers, name, value)
    outcome = gpu_check.test_file("test_fake.py", dict(os.environ), time.monotonic() + 40)
    names = {word: [name.partition("::")[2] for name in found] for word, found in outcome.items() if found}
    assert names == {"passed": ["test_good", "test_behind_it"], "failed": ["test_bad"], "hung": ["test_hangs"]}


SANITIZER = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift 2; done
"$@"
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_all_stages_run_dry_on_a_bare_machine(tmp_path):
    (tmp_path / "msgspec.py").write_text("raise ImportError('this machine has no msgspec')")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    standin = Path(cupy.__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, standin))), "GPU_CHECK_OUT": str(tmp_path / "out"),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    words = ["--dry", "--only", "gelu.forward,sums.tree", "--reference", "all", "--tests", "tests/cuda/test_gelu.py"]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), *words]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "no figure below means anything" in ended.stdout and ended.stdout.endswith("Nothing failed.\n")
    found = json.loads(next((tmp_path / "out").glob("gpu_stand-in_*.json")).read_text())
    assert {(row["function"], row["dtype"], row["kernel"]) for row in found["kernels"]} == {
        ("gelu.forward", "bfloat16", "kernel"), ("gelu.forward", "float32", "kernel"),
        ("sums.tree", "float32", "kernel"),
    }  # fmt: skip
    assert found["tests"]["tests/cuda/test_gelu.py"]["passed"]
    assert found["sanitizers"]["racecheck"]["summary"] == ["ERROR SUMMARY: 0 errors"]
    assert min(found["step"]["sides"][side]["tokens_per_s"] for side in ("ours", "ours, graphs")) > 0
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before
