// Attention on Hopper: tiles that TMA brings, products of warpgroups by wgmma.
//
// A block is a warpgroup that loads, by one thread, and two that multiply, 64 rows each. A tile in shared memory is
// boxes of 64 columns, as wide as a swizzle of 128 bytes: the left 64 of all rows, then the right ones.
//
// Thread l of a warpgroup holds, of 64 rows of a product, rows l div 4 mod 8 + 16 (l div 32) (elements with i div 2
// even) and 8 below (odd); element i lies in column 8 (i div 4) + 2 l mod 8 + i mod 2.
#pragma once
#include "attention.cuh"

constexpr int CONSUMERS = 2, THREADS = 128 * (CONSUMERS + 1);
constexpr int ROWS = 64;  // of a consumer
constexpr int OWNED = CONSUMERS * ROWS;
constexpr int HALVES = HEAD / 64;
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
constexpr int STORE = 1;  // the first of the consumers' named barriers

// the same for a warp, and shuffled so that the compiler knows: wgmma wants branches that are uniform
__device__ __forceinline__ int warpgroup() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }
// of the rows of the warpgroup, this thread's first; the other is 8 below
__device__ __forceinline__ int row() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }
// of element i of a product
__device__ __forceinline__ int column(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

// Places in shared memory that tiles go through, in order: filled by the producer, given back by the consumers.
template <int STAGES> struct Ring {
    uint64_t full[STAGES], empty[STAGES];

    __device__ void init() {
        for (int i = 0; i < STAGES; i++) mbar_init(&full[i], 1), mbar_init(&empty[i], CONSUMERS * 4);
    }
    // for the producer: the place of this tile is free; `bytes` are about to come
    __device__ uint64_t *open(int tile, int bytes) {
        mbar_wait(&empty[tile % STAGES], (tile / STAGES & 1) ^ 1);
        mbar_expect_tx(&full[tile % STAGES], bytes);
        return &full[tile % STAGES];
    }
    __device__ void wait(int tile) { mbar_wait(&full[tile % STAGES], tile / STAGES & 1); }
    // a warp knows of its own products only: each of them says that it has read the tile
    __device__ void release(int tile) {
        if (threadIdx.x % 32 == 0) mbar_arrive(&empty[tile % STAGES]);
    }
};

// LENGTH rows from `first` on; rows and columns that do not exist are zeros.
template <int LENGTH>
__device__ __forceinline__ void load_tile(
    bf16 *tile, const CUtensorMap *map, uint64_t *full, int first, const Work &work) {
    for (int half = 0; half < HALVES; half++)
        tma_load_4d(tile + half * LENGTH * 64, map, full, half * 64, first, work.h, work.b);
}

// The rows a block owns, those of one consumer after those of the other.
__device__ __forceinline__ void load_owned(
    bf16 *tile, const CUtensorMap *map, uint64_t *full, int first, const Work &work) {
    for (int i = 0; i < CONSUMERS; i++) load_tile<ROWS>(tile + i * ROWS * HEAD, map, full, first + i * ROWS, work);
}

// out = left rightᵀ, of the consumer's rows of a tile and a tile of N rows; under way until a wait
template <int N> __device__ __forceinline__ void multiply(bf16 *left, bf16 *right, float (&out)[N / 2]) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HEAD; k += 16) {
        bf16 *a = left + k / 64 * ROWS * 64 + k % 64, *b = right + k / 64 * N * 64 + k % 64;
        wgmma<N>(out, smem_desc(a), smem_desc(b), k > 0);
    }
    wgmma_commit();
}

// sum += weights rows, of a tile of as many rows as there are columns of weights; under way until a wait
template <int STEPS>
__device__ __forceinline__ void accumulate(const uint32_t (&weights)[STEPS][4], bf16 *rows, float (&sum)[HEAD / 2]) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        wgmma<HEAD, true>(sum, weights[k], smem_desc_mn(rows + k * 16 * 64, STEPS * 16 * 128));
    wgmma_commit();
}

// a product as the left operand of another
template <int N> __device__ __forceinline__ void pack(const float (&values)[N], uint32_t (&pairs)[N / 8][4]) {
#pragma unroll
    for (int i = 0; i < N; i += 2) pairs[i / 8][i % 8 / 2] = pack_bf16(values[i], values[i + 1]);
}

template <int N> __device__ __forceinline__ void rescale(float (&values)[N], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < N; i++) values[i] *= factor[i / 2 % 2];
}

// The consumer's rows to memory, by way of its own rows of a tile, from row `first` on. TMA leaves out rows that do not
// exist. Before the block ends `tma_store_wait_read<0>` has to follow.
__device__ __forceinline__ void store_rows(
    const float (&sum)[HEAD / 2], bf16 *tile, const CUtensorMap *map, int first, int consumer, const Work &work) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    uint32_t pairs[HEAD / 16][4];
    pack(sum, pairs);
#pragma unroll
    for (int c = 0; c < HEAD / 8; c += 2) {
        int at = c + lane / 16;
        stmatrix_x4<false>(tile + at / 8 * ROWS * 64 + row * 64 + (at % 8 ^ row % 8) * 8, pairs[c / 2]);
    }
    fence_proxy_async();
    named_barrier_sync(STORE + consumer, 128);
    if (threadIdx.x % 128 > 0) return;
    for (int half = 0; half < HALVES; half++)
        tma_store_4d(map, tile + half * ROWS * 64, half * 64, first, work.h, work.b);
    tma_store_commit();
}
