// Attention on tensor cores by mma.sync: tiles of bfloat16 rows in shared memory, and products of their fragments.
//
// A tile's rows are HEAD wide, in pieces of 16 bytes; piece c of row r lies at c ^ r % 8, so that 8 rows of one column,
// which ldmatrix reads at a time, touch all 32 banks once.
//
// A warp owns M bands of 16 rows of a product. Of the 8 columns of a block, lane l holds 2 l mod 8 and the next, in
// rows l div 4 (elements 0, 1) and l div 4 + 8 (elements 2, 3) of the band: the layout of mma.m16n8k16.
#pragma once
#include "attention.cuh"

constexpr int PIECES = HEAD / 8;
constexpr int STEPS = HEAD / 16;  // of one mma along the width

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

__device__ __forceinline__ bf16 *piece(bf16 *tile, int row, int c) { return tile + row * HEAD + (c ^ (row & 7)) * 8; }

// Rows first … first + ROWS − 1 on their way into a tile; beyond `count` rows and beyond the width zeros.
template <int ROWS, int THREADS>
__device__ __forceinline__ void load_rows(
    const bf16 *rows, int64_t stride, int first, int count, int width, bf16 *tile) {
    constexpr int STEP = THREADS / PIECES;
    const int r = threadIdx.x / PIECES, c = threadIdx.x % PIECES;
    const bf16 *from = rows + (first + r) * stride + c * 8;
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP, from += STEP * stride) {
        bool there = first + r + i < count && c * 8 < width;
        cp_async16(piece(tile, r + i, c), there ? from : rows, there);
    }
}

// The fragments of `step` of the M bands from row `first` on, as the left operand of a product along the width.
template <int M> __device__ __forceinline__ void left_fragments(bf16 *tile, int first, int step, uint32_t (&a)[M][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
        ldmatrix_x4<false>(a[m], piece(tile, first + m * 16 + lane() % 16, step * 2 + lane() / 16));
}

// out = left rightᵀ: `left(step, a)` gives the fragments; N blocks of 8 columns are rows of a tile from `first` on.
// UNROLL: steps whose fragments the compiler may load ahead; each costs registers.
template <int UNROLL, int M, int N, class Left>
__device__ __forceinline__ void multiply(Left left, bf16 *right, int first, float (&out)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) out[m][n][e] = 0.0f;
#pragma unroll(UNROLL)
    for (int step = 0; step < STEPS; step++) {
        uint32_t a[M][4];
        left(step, a);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            int row = first + n * 8 + lane() % 8 + lane() / 16 * 8;
            ldmatrix_x4<false>(b, piece(right, row, step * 2 + lane() / 8 % 2));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16(out[m][n], a[m], b);
                mma_m16n8k16(out[m][n + 1], a[m], b + 2);
            }
        }
    }
}

// sum += left rows, of K rows of a tile from `first` on: `left(k, a)` gives the fragments of columns k … k + 15.
template <int K, int M, class Left>
__device__ __forceinline__ void accumulate(Left left, bf16 *rows, int first, float (&sum)[M][PIECES][4]) {
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        uint32_t a[M][4];
        left(k, a);
#pragma unroll
        for (int c = 0; c < PIECES; c += 2) {
            uint32_t b[4];
            ldmatrix_x4<true>(b, piece(rows, first + k + lane() % 16, c + lane() / 16));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16(sum[m][c], a[m], b);
                mma_m16n8k16(sum[m][c + 1], a[m], b + 2);
            }
        }
    }
}

// Which weights of such a product dropout keeps, a bit for each in the order of out[M][N][4]; `kept(row, column)` says
// it of the warp's rows and the product's columns. A loop of its own: unrolled among the products, Philox would cost
// registers that there are not.
template <int M, int N, class Kept> __device__ __forceinline__ uint64_t kept_bits(Kept kept) {
    if (!DROPOUT) return ~0ull;
    uint64_t bits = 0;
#pragma unroll 1
    for (int i = 0; i < M * N * 4; i++) {
        int row = i / (N * 4) * 16 + i % 4 / 2 * 8 + lane() / 4, column = i / 4 % N * 8 + lane() % 4 * 2 + i % 2;
        bits |= uint64_t(kept(row, column)) << i;
    }
    return bits;
}

template <int N> __device__ __forceinline__ bool is_kept(uint64_t bits, int m, int n, int e) {
    return bits >> ((m * N + n) * 4 + e) & 1;
}

// The warp's bands times a factor per row to memory, by way of its own rows of a tile, which nobody else reads any
// more: 16 bytes a lane. `first` is the warp's first row in the tile, `row` the number of the tile's first row.
template <int M>
__device__ __forceinline__ void store_rows(
    const float (&sum)[M][PIECES][4], const float (&factor)[M][2], bf16 *tile, int first, bf16 *rows, int64_t stride,
    int row, int count, int width) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int c = 0; c < PIECES; c++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                bf16 *to = piece(tile, first + m * 16 + lane() / 4 + half * 8, c) + lane() % 4 * 2;
                *reinterpret_cast<uint32_t *>(to) =
                    pack_bf16(sum[m][c][half * 2] * factor[m][half], sum[m][c][half * 2 + 1] * factor[m][half]);
            }
    __syncwarp();
#pragma unroll
    for (int i = lane(); i < M * 16 * PIECES; i += 32) {
        int r = first + i / PIECES, c = i % PIECES;
        if (row + r < count && c * 8 < width)
            *reinterpret_cast<uint4 *>(rows + (row + r) * stride + c * 8) =
                *reinterpret_cast<const uint4 *>(piece(tile, r, c));
    }
}
