"""The emulator can fail: each planted bug of probes/bugs.cu is seen, and its twin without the bug passes."""

import re

import cupy
import numpy as np
import pytest
from conftest import ON_GPU
from probes import probe

from mlm_mpi.backend import choice

pytestmark = pytest.mark.skipif(ON_GPU, reason="a planted bug is undefined behaviour on a GPU")

SEEDS = range(8)
WRONG = "a wrong answer"
BUGS = {  # kernel -> how its bug shows: a wrong answer, or what the report says
    "missing_barrier": WRONG,
    "missing_barrier_before_the_next_tile": WRONG,
    "missing_syncwarp": WRONG,
    "missing_cp_async_wait": WRONG,
    "one_cp_async_group_too_few": WRONG,
    "missing_mbarrier_wait": WRONG,
    "wrong_parity": "deadlock: .*mbarrier wait",
    "missing_wait_for_an_empty_slot": "a wrong answer|mbarrier: more arrivals than its count",
    "bytes_never_come": "deadlock: threads 0-127: mbarrier wait",
    "missing_init": "mbarrier: used before mbar_init",
    "missing_wgmma_wait": WRONG,
    "wgmma_group_never_committed": "wgmma: the block ended before its wait",
    "missing_wgmma_fence": "wgmma: no wgmma.fence since the last wait",
    "load_between_16_bytes": "TMA load: an innermost coordinate of 2, not a multiple of 16 bytes",
    "store_between_16_bytes": "TMA store: an innermost coordinate of 2, not a multiple of 16 bytes",
    "store_before_the_tensor": "TMA store: a negative coordinate, -1",
    "store_without_a_fence": "TMA store: no thread has called fence_proxy_async",
    "store_without_a_wait": "TMA store: the block ended before its wait",
    "tile_reused_before_its_store_has_read_it": WRONG,
    "write_behind_y": r"invalid address 0x\w+ \[block 0,0,0 thread 127\], 512 bytes from the start of an array of 512",
    "write_before_y": "a write before the 500 bytes",
    "read_behind_x": r"invalid address 0x\w+ \[block 0,0,0 thread 0\], 524 bytes from the start of an array of 512",
    "write_behind_shared_memory": "a write behind dynamic shared memory",
    "read_of_what_nobody_wrote": WRONG,
    "barriers_in_two_branches": r"divergent __syncthreads: lines \d+ and \d+",
    "barrier_in_one_branch": r"deadlock: threads 0-15: __syncthreads \(line \d+\); threads 16-31: __syncwarp",
    "mask_without_the_caller": "lane 31 calls a warp collective with mask 7fffffff",
    "named_barrier_counts_differ": "named barrier 1: (64|128) threads here, (128|64) there",
    "named_barrier_short_of_a_warp": "deadlock: threads 0-95: named barrier; threads 96-127: returned",
    "misaligned_cp_async": "cp.async: an address that is no multiple of 16",
    "sum_in_the_order_of_arrival": WRONG,
}
TILE_OF_Y = (
    "store_between_16_bytes",
    "store_before_the_tensor",
    "store_without_a_fence",
    "store_without_a_wait",
    "tile_reused_before_its_store_has_read_it",
)
SHORT = ("write_before_y", "write_behind_shared_memory")  # 125 elements: canaries on the array's own pages


@pytest.fixture
def gpu():
    yield choice.select(device="cuda").first.library
    choice.select()


def outcome(gpu, name, bug, seed):
    """ "", WRONG, or what was reported."""
    n = 125 if name in SHORT else 128
    x = cupy.asarray(np.random.default_rng(seed).normal(size=n).astype("f4"))
    y = cupy.empty(n, np.float32)
    tiled = y if name in TILE_OF_Y else x
    rows = 1 if name == "missing_wait_for_an_empty_slot" else 4
    tile_map = gpu.tensor_map(tiled[:96].reshape(3, 32) if n == 125 else tiled.reshape(4, 32), (rows, 32), 0)
    shared = 4 * n if name == "write_behind_shared_memory" else 2 * 64 * 64 * 2
    cupy.seed(seed)
    try:
        probe(gpu, "bugs", name, BUG=bug)((1,), (128,), (tile_map, x, y, np.int32(n)), shared_mem=shared)
    except RuntimeError as error:
        return str(error)
    return "" if np.array_equal(y.get(), x.get()[::-1]) else WRONG


@pytest.mark.parametrize("name", BUGS)
def test_the_right_twin_passes(gpu, name):
    assert [outcome(gpu, name, 0, seed) for seed in SEEDS] == [""] * len(SEEDS)


@pytest.mark.parametrize("name", BUGS)
def test_the_bug_is_seen(gpu, name):
    outcomes = [outcome(gpu, name, 1, seed) for seed in SEEDS]
    assert any(re.search(BUGS[name], found) for found in outcomes), outcomes
