"""The sanitizers see what is planted, in a process of its own, and nothing in the twins without a bug."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ON_GPU
from sanitizers import environment, findings

pytestmark = pytest.mark.skipif(ON_GPU, reason="sanitizers of g++ see emulated kernels only")

RUN = """
import sys
from mlm_mpi.backend import choice
from test_harness import outcome
gpu = choice.select(device="cuda").first.library
for name in sys.argv[2:]:
    outcome(gpu, name, int(sys.argv[1]), seed=1)
"""


def found(kind, bug, names, logs):
    """What the sanitizer says of these kernels of probes/bugs.cu."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here / "standin"), str(here), os.environ.get("PYTHONPATH", "")])
    env = os.environ | environment(kind, logs) | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", RUN, str(bug), *names], env=env, check=True, timeout=300)
    return findings(logs)


SHOWN = {
    "thread": {
        "missing_barrier": "data race .* in missing_barrier",
        "missing_barrier_before_the_next_tile": "data race .* in missing_barrier_before_the_next_tile",
        "missing_syncwarp": "data race .* in missing_syncwarp",
    },
    "address": {"write_behind_a_static_array": "global-buffer-overflow .* in write_behind_a_static_array"},
}


@pytest.mark.parametrize("kind", SHOWN)
def test_planted_bugs_are_found(kind, tmp_path):
    text = found(kind, 1, SHOWN[kind], tmp_path)
    for name, pattern in SHOWN[kind].items():
        assert re.search(f"SUMMARY: .*{pattern}", text), f"{name}: {text[:2000]}"


@pytest.mark.parametrize("kind", SHOWN)
def test_right_twins_are_clean(kind, tmp_path):
    asynchronous = [
        "missing_cp_async_wait",
        "missing_wait_for_an_empty_slot",
        "missing_wgmma_wait",
        "store_without_a_wait",
    ]
    assert not found(kind, 0, [*SHOWN[kind], *asynchronous], tmp_path)
