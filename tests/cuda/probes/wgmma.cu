// wgmma in every layout of its operands: test_hopper.py compares it with its meaning.
#include "common.cuh"

// ROWS x 64 bf16 boxes of a map, `boxes` of them along x, one after another in shared memory
template <int ROWS> __device__ void load_boxes(bf16 *tile, const CUtensorMap *map, uint64_t *barrier, int boxes, int y) {
    for (int i = 0; i < boxes; i++) tma_load_2d(tile + i * ROWS * 64, map, barrier, i * 64, y);
}

__device__ void store_accumulators(float *c, const float *d, int n) {
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    for (int i = 0; i < n / 2; i++) c[(row + i / 2 % 2 * 8) * n + column + i / 4 * 8 + i % 2] = d[i];
}

// c (64, WIDTH) = 2 A B over two tiles of K = 64. A_MN: a is (128, 64), else (64, 128); B_MN: b is (128, WIDTH), else (WIDTH, 128)
extern "C" __global__ void __launch_bounds__(128) wgmma_probe(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map, float *c) {
    constexpr int A_TILE = 64 * 64, B_TILE = WIDTH * 64;
    DYNAMIC_SMEM(bf16, a);
    bf16 *b = a + A_TILE;
    __shared__ uint64_t full;
    if (threadIdx.x == 0) {
        mbar_init(&full, 1);
        mbar_fence_init();
    }
    __syncthreads();
    float d[WIDTH / 2];
    for (int tile = 0; tile < 2; tile++) {
        if (threadIdx.x == 0) {
            mbar_expect_tx(&full, (A_TILE + B_TILE) * 2);
            if (A_MN)
                tma_load_2d(a, &a_map, &full, 0, tile * 64);
            else
                tma_load_2d(a, &a_map, &full, tile * 64, 0);
            if (B_MN)
                load_boxes<64>(b, &b_map, &full, WIDTH / 64, tile * 64);
            else
                tma_load_2d(b, &b_map, &full, tile * 64, 0);
        }
        mbar_wait(&full, tile);
        for (int again = 0; again < 2; again++) {
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < 64; k += 16)
                wgmma<WIDTH, A_MN, B_MN>(d, A_MN ? smem_desc_mn(a + k * 64, A_TILE * 2) : smem_desc(a + k),
                                         B_MN ? smem_desc_mn(b + k * 64, 64 * 64 * 2) : smem_desc(b + k),
                                         tile || again || k);
            wgmma_commit();
            wgmma_wait<0>();
        }
        __syncthreads();
    }
    store_accumulators(c, d, WIDTH);
}

// c (64, WIDTH) = A B; a (64, 16) from registers; b as above, of 64 k, the last 16 of which count
extern "C" __global__ void __launch_bounds__(128) wgmma_registers(const uint32_t *a, const __grid_constant__ CUtensorMap b_map, float *c) {
    DYNAMIC_SMEM(bf16, b);
    __shared__ uint64_t full;
    if (threadIdx.x == 0) {
        mbar_init(&full, 1);
        mbar_fence_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbar_expect_tx(&full, WIDTH * 64 * 2);
        if (B_MN)
            load_boxes<64>(b, &b_map, &full, WIDTH / 64, 0);
        else
            tma_load_2d(b, &b_map, &full, 0, 0);
    }
    mbar_wait(&full, 0);
    uint32_t fragment[4];
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    for (int i = 0; i < 4; i++) fragment[i] = a[(row + i % 2 * 8) * 8 + threadIdx.x % 4 + i / 2 * 4];
    float d[WIDTH / 2];
    wgmma_fence();
    wgmma<WIDTH, B_MN>(d, fragment, B_MN ? smem_desc_mn(b + 48 * 64, 64 * 64 * 2) : smem_desc(b + 48), false);
    wgmma_commit();
    wgmma_wait<0>();
    store_accumulators(c, d, WIDTH);
}
