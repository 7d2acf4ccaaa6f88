// The bugs that kernels have, each planted in a kernel that reverses: y[i] = x[n - 1 - i], one block of 128 threads, n <= 128.
// Compiled with -DBUG=0 all are right; test_harness.py says how the emulator shows each with -DBUG=1.
#include "common.cuh"

__device__ void load_by_tma(float *tile, const CUtensorMap *map, uint64_t *full) {
    if (threadIdx.x == 0) {
        mbar_init(full, 1);
        mbar_fence_init();
        mbar_expect_tx(full, 512);
        tma_load_2d(tile, map, full, 0, 0);
    }
    __syncthreads();
}

extern "C" __global__ void missing_barrier(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    __shared__ float tile[128];
    int i = threadIdx.x;
    if (i < n) tile[i] = x[i];
    if (!BUG) __syncthreads();
    if (i < n) y[i] = tile[n - 1 - i];
}

extern "C" __global__ void missing_syncwarp(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    __shared__ float tile[128];
    int i = threadIdx.x, mirror = i / 32 * 32 + 31 - i % 32;
    tile[i] = x[i];
    if (!BUG) __syncwarp();
    y[n - 1 - mirror] = tile[mirror];
}

extern "C" __global__ void missing_cp_async_wait(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(float, tile);
    int i = threadIdx.x;
    if (i < 32) cp_async16(tile + 4 * i, x + 4 * i);
    cp_async_commit();
    if (!BUG) cp_async_wait<0>();
    __syncthreads();
    y[i] = tile[n - 1 - i];
}

extern "C" __global__ void one_cp_async_group_too_few(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(float, tile);
    int i = threadIdx.x;
    for (int group = 0; group < 2; group++) {
        if (i < 16) cp_async16(tile + 64 * group + 4 * i, x + 64 * group + 4 * i);
        cp_async_commit();
    }
    cp_async_wait<BUG>();
    __syncthreads();
    y[i] = tile[n - 1 - i];
}

extern "C" __global__ void missing_mbarrier_wait(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(float, tile);
    __shared__ uint64_t full;
    load_by_tma(tile, &map, &full);
    if (!BUG || threadIdx.x == 0) mbar_wait(&full, 0);
    y[threadIdx.x] = tile[n - 1 - threadIdx.x];
}

extern "C" __global__ void wrong_parity(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(float, tile);
    __shared__ uint64_t full;
    load_by_tma(tile, &map, &full);
    if (threadIdx.x == 0) mbar_wait(&full, 0);
    mbar_wait(&full, BUG);
    y[threadIdx.x] = tile[n - 1 - threadIdx.x];
}

extern "C" __global__ void missing_wait_for_an_empty_slot(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(float, tile);  // a ring of one slot: thread 0 fills it eight times, the last three warps empty it
    __shared__ uint64_t full, empty;
    int i = threadIdx.x;
    if (i == 0) {
        mbar_init(&full, 1);
        mbar_init(&empty, 96);
        mbar_fence_init();
    }
    __syncthreads();
    if (i == 0)
        for (int round = 0; round < 4; round++) {
            if (!BUG) mbar_wait(&empty, round % 2 ^ 1);
            mbar_expect_tx(&full, 128);
            tma_load_2d(tile, &map, &full, 0, round);
        }
    else if (i >= 32)
        for (int round = 0; round < 4; round++) {
            mbar_wait(&full, round % 2);
            if (i < 64) y[n - 1 - round * 32 - (i - 32)] = tile[i - 32];
            mbar_arrive(&empty);
        }
}

extern "C" __global__ void bytes_never_come(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(float, tile);
    __shared__ uint64_t full;
    if (threadIdx.x == 0) {
        mbar_init(&full, 1);
        mbar_fence_init();
        mbar_expect_tx(&full, BUG ? 1024 : 512);
        tma_load_2d(tile, &map, &full, 0, 0);
    }
    __syncthreads();
    mbar_wait(&full, 0);
    y[threadIdx.x] = tile[n - 1 - threadIdx.x];
}

extern "C" __global__ void missing_init(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(float, tile);
    __shared__ uint64_t full;
    if (threadIdx.x == 0) {
        if (!BUG) mbar_init(&full, 1);
        mbar_fence_init();
        mbar_expect_tx(&full, 512);
        tma_load_2d(tile, &map, &full, 0, 0);
    }
    __syncthreads();
    mbar_wait(&full, 0);
    y[threadIdx.x] = tile[n - 1 - threadIdx.x];
}

extern "C" __global__ void missing_wgmma_wait(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(bf16, ones);  // A (64, 16) and B (16, 64) of ones: every element of A B is 16
    int i = threadIdx.x;
    for (int k = i; k < 2 * 64 * 64; k += 128) ones[k] = from_float<bf16>(1.0f);
    fence_proxy_async();
    __syncthreads();
    float d[32] = {};
    wgmma_fence();
    wgmma<64>(d, smem_desc(ones), smem_desc(ones + 64 * 64));
    wgmma_commit();
    if (!BUG) wgmma_wait<0>();
    y[i] = x[n - 1 - i] * (d[5] / 16.0f);
    wgmma_wait<0>();
}

extern "C" __global__ void wgmma_group_never_committed(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(bf16, ones);  // A (64, 16) and B (16, 64) of ones: every element of A B is 16
    int i = threadIdx.x;
    for (int k = i; k < 2 * 64 * 64; k += 128) ones[k] = from_float<bf16>(1.0f);
    fence_proxy_async();
    __syncthreads();
    float d[32] = {};
    wgmma_fence();
    wgmma<64>(d, smem_desc(ones), smem_desc(ones + 64 * 64));
    if (!BUG) wgmma_commit();
    wgmma_wait<0>();
    y[i] = x[n - 1 - i] * (d[5] / 16.0f);
}

extern "C" __global__ void missing_wgmma_fence(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(bf16, ones);  // A (64, 16) and B (16, 64) of ones: every element of A B is 16
    int i = threadIdx.x;
    for (int k = i; k < 2 * 64 * 64; k += 128) ones[k] = from_float<bf16>(1.0f);
    fence_proxy_async();
    __syncthreads();
    float d[32] = {};
    if (!BUG) wgmma_fence();
    wgmma<64>(d, smem_desc(ones), smem_desc(ones + 64 * 64));
    wgmma_commit();
    wgmma_wait<0>();
    y[i] = x[n - 1 - i] * (d[5] / 16.0f);
}

extern "C" __global__ void store_without_a_fence(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(float, tile);  // here the map is that of y
    tile[threadIdx.x] = x[n - 1 - threadIdx.x];
    if (!BUG) fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store_2d(&map, tile, 0, 0);
        tma_store_commit();
        tma_store_wait_read<0>();
    }
}

extern "C" __global__ void load_between_16_bytes(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(float, tile);
    __shared__ uint64_t full;
    if (threadIdx.x == 0) {
        mbar_init(&full, 1);
        mbar_fence_init();
        mbar_expect_tx(&full, 512);
        tma_load_2d(tile, &map, &full, BUG ? 2 : 0, 0);
    }
    __syncthreads();
    mbar_wait(&full, 0);
    y[threadIdx.x] = tile[n - 1 - threadIdx.x];
}

extern "C" __global__ void store_between_16_bytes(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(float, tile);
    tile[threadIdx.x] = x[n - 1 - threadIdx.x];
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store_2d(&map, tile, BUG ? 2 : 0, 0);
        tma_store_commit();
        tma_store_wait_read<0>();
    }
}

extern "C" __global__ void store_before_the_tensor(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(float, tile);
    tile[threadIdx.x] = x[n - 1 - threadIdx.x];
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store_2d(&map, tile, 0, BUG ? -1 : 0);
        tma_store_commit();
        tma_store_wait_read<0>();
    }
}

extern "C" __global__ void store_without_a_wait(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(float, tile);
    tile[threadIdx.x] = x[n - 1 - threadIdx.x];
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store_2d(&map, tile, 0, 0);
        tma_store_commit();
        if (!BUG) tma_store_wait_read<0>();
    }
}

extern "C" __global__ void tile_reused_before_its_store_has_read_it(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(float, tile);
    tile[threadIdx.x] = x[n - 1 - threadIdx.x];
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store_2d(&map, tile, 0, 0);
        tma_store_commit();
        if (!BUG) tma_store_wait_read<0>();
        tile[5] = 0.0f;
        tma_store_wait_read<0>();
    }
}

extern "C" __global__ void write_behind_y(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    int i = threadIdx.x;
    if (i < n) y[i + BUG] = x[n - 1 - i];
    if (BUG && i == 0) y[0] = x[n - 1];
}

extern "C" __global__ void write_before_y(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    int i = threadIdx.x;
    if (i < n) y[i] = x[n - 1 - i];
    if (BUG && i == 0) y[-1] = 0.0f;
}

extern "C" __global__ void read_behind_x(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    int i = threadIdx.x;
    if (i < n) y[i] = x[n - 1 - i + (BUG && i == 0 ? 4 : 0)];
}

extern "C" __global__ void write_behind_shared_memory(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(float, tile);
    int i = threadIdx.x;
    if (i < n) tile[i] = x[i];
    if (BUG && i == 0) tile[n] = 0.0f;
    __syncthreads();
    if (i < n) y[i] = tile[n - 1 - i];
}

extern "C" __global__ void read_of_what_nobody_wrote(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    __shared__ float tile[128];
    int i = threadIdx.x;
    if (i < n - BUG) tile[i] = x[i];
    __syncthreads();
    if (i < n) y[i] = tile[n - 1 - i];
}

extern "C" __global__ void write_behind_a_static_array(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    __shared__ float tile[128], other[128];
    int i = threadIdx.x;
    other[i] = 0.0f;
    tile[i] = x[i];
    if (BUG && i == 0) tile[n] = 0.0f;
    __syncthreads();
    y[i] = tile[n - 1 - i] + other[0] * 0.0f;
}

extern "C" __global__ void barriers_in_two_branches(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    int i = threadIdx.x;
    if (BUG && i < 64) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    y[i] = x[n - 1 - i];
}

extern "C" __global__ void barrier_in_one_branch(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    int i = threadIdx.x;
    if (BUG && i < 16)
        __syncthreads();
    else
        __syncwarp();
    y[i] = x[n - 1 - i];
}

extern "C" __global__ void mask_without_the_caller(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    int i = threadIdx.x;
    y[i] = __shfl_sync(BUG ? 0x7fffffffu : ~0u, x[n - 1 - i], i % 32);
}

extern "C" __global__ void named_barrier_counts_differ(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    int i = threadIdx.x;
    named_barrier_sync(1, BUG && i >= 64 ? 64 : 128);
    y[i] = x[n - 1 - i];
}

extern "C" __global__ void named_barrier_short_of_a_warp(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    int i = threadIdx.x;
    if (i < 96 || !BUG) named_barrier_sync(1, 128);
    y[i] = x[n - 1 - i];
}

extern "C" __global__ void misaligned_cp_async(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    DYNAMIC_SMEM(float, tile);
    int i = threadIdx.x;
    if (i < 32) cp_async16(tile + 4 * i, x + 4 * i + (BUG && i == 3));
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    y[i] = tile[n - 1 - i];
}

extern "C" __global__ void sum_in_the_order_of_arrival(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    __shared__ int slots;  // each thread takes the next slot: which one, the schedule decides
    int i = threadIdx.x;
    if (i == 0) slots = 0;
    __syncthreads();
    int slot = atomicAdd(&slots, 1);
    y[n - 1 - (BUG ? slot : i)] = x[i];
}

extern "C" __global__ void missing_barrier_before_the_next_tile(const __grid_constant__ CUtensorMap map, const float *x, float *y, int n) {
    __shared__ float tile[64];
    int i = threadIdx.x;
    for (int half = 0; half < 2; half++) {
        if (i < 64) tile[i] = x[half * 64 + i];
        __syncthreads();
        if (i >= 64) y[n - 1 - half * 64 - (i - 64)] = tile[i - 64];
        if (!BUG) __syncthreads();
    }
}
