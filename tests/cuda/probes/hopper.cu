// Small kernels over the Hopper instructions of ptx.cuh: test_hopper.py compares each with its meaning.
#include "common.cuh"

// A box through shared memory and back, elsewhere: `at` and `to` are coordinates, innermost first
extern "C" __global__ void copy_box(const __grid_constant__ CUtensorMap in, const __grid_constant__ CUtensorMap out, int rank, const int *at, const int *to, int bytes) {
    DYNAMIC_SMEM(unsigned char, tile);
    __shared__ uint64_t full;
    if (threadIdx.x != 0) return;
    tma_prefetch(&in);
    mbar_init(&full, 1);
    mbar_fence_init();
    mbar_expect_tx(&full, bytes);
    if (rank == 2) tma_load_2d(tile, &in, &full, at[0], at[1]);
    if (rank == 3) tma_load_3d(tile, &in, &full, at[0], at[1], at[2]);
    if (rank == 4) tma_load_4d(tile, &in, &full, at[0], at[1], at[2], at[3]);
    mbar_wait(&full, 0);
    fence_proxy_async();
    if (rank == 2) tma_store_2d(&out, tile, to[0], to[1]);
    if (rank == 3) tma_store_3d(&out, tile, to[0], to[1], to[2]);
    if (rank == 4) tma_store_4d(&out, tile, to[0], to[1], to[2], to[3]);
    tma_store_commit();
    tma_store_wait_read<0>();
}

// where a swizzle puts the elements of a (rows, 64) bf16 tile: y is shared memory as it lies
extern "C" __global__ void swizzle_probe(const __grid_constant__ CUtensorMap in, bf16 *y, int size) {
    DYNAMIC_SMEM(bf16, tile);
    __shared__ uint64_t full;
    if (threadIdx.x == 0) {
        mbar_init(&full, 1);
        mbar_fence_init();
        mbar_expect_tx(&full, size * 2);
        tma_load_2d(tile, &in, &full, 0, 0);
    }
    __syncthreads();
    mbar_wait(&full, 0);
    for (int i = threadIdx.x; i < size; i += blockDim.x) y[i] = tile[i];
}

// four 8x8 matrices from registers to shared memory: y is shared memory as it lies, x[lane][4] the registers
extern "C" __global__ void stmatrix_probe(const uint32_t *x, uint16_t *y, int transposed) {
    __shared__ __align__(16) uint16_t tile[4 * 64];
    uint32_t r[4];
    for (int i = 0; i < 4; i++) r[i] = x[threadIdx.x * 4 + i];
    if (transposed)
        stmatrix_x4<true>(tile + threadIdx.x * 8, r);
    else
        stmatrix_x4<false>(tile + threadIdx.x * 8, r);
    __syncwarp();
    for (int i = 0; i < 8; i++) y[threadIdx.x * 8 + i] = tile[threadIdx.x * 8 + i];
}

// ping-pong: 64 threads hand numbers to 32 others through one slot, by two named barriers; y[i] = the sum of round i
extern "C" __global__ void handover(int *y, int rounds) {
    __shared__ int slot[64];
    for (int i = 0; i < rounds; i++) {
        if (threadIdx.x < 64) {
            if (i) named_barrier_sync(2, 96);  // the slot has been read
            slot[threadIdx.x] = i * 100 + threadIdx.x;
            named_barrier_arrive(1, 96);
        } else {
            named_barrier_sync(1, 96);  // the slot is full
            int sum = slot[threadIdx.x - 64] + slot[threadIdx.x - 32];
            for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
            if (elect_one()) y[i] = sum;
            if (i + 1 < rounds) named_barrier_arrive(2, 96);
        }
    }
}

extern "C" __global__ void exp2_probe(const float *x, float *y, int size) {
    for (int i = threadIdx.x; i < size; i += blockDim.x) y[i] = exp2_approx(x[i]);
}
