// Rows of a matrix that blocks keep in registers: layernorm.cu, rmsnorm.cu.
//
// WARPS warps share a row, ROWS rows share a block of (32 WARPS, ROWS) threads; a thread holds PACKS packs of WIDTH
// elements of a row. WEIGHT is the type of what a row is multiplied with.
#pragma once
#include "common.cuh"

constexpr int LINE = 32 * WARPS;            // threads of a row
constexpr int BLOCK = LINE * ROWS;          // threads of a block
constexpr int SPAN = PACKS * WIDTH * LINE;  // columns that fit

// body(p, column): pack p of this thread holds the columns column … column + WIDTH - 1
template <class F> __device__ __forceinline__ void over_packs(int columns, F body) {
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        int column = (p * LINE + threadIdx.x) * WIDTH;
        if (column < columns) body(p, column);
    }
}

__device__ __forceinline__ float row_sum(float x) { return group_sum<WARPS, ROWS>(x); }

// Sums over the block's rows of what each row has summed per column, in order, into out[0 … columns - 1].
__device__ __forceinline__ void leave(const Pack<float, WIDTH> (&sums)[PACKS], float *out, int columns) {
    if constexpr (ROWS == 1) {
        over_packs(columns, [&](int p, int column) { store(out + column, sums[p]); });
    } else {
        __shared__ __align__(16) float parts[ROWS][SPAN];
        __syncthreads();  // earlier parts have been read
        over_packs(columns, [&](int p, int column) {
            *reinterpret_cast<Pack<float, WIDTH> *>(parts[threadIdx.y] + column) = sums[p];
        });
        __syncthreads();
        for (int column = threadIdx.y * LINE + threadIdx.x; column < columns; column += BLOCK) {
            float sum = 0.0f;
            for (int row = 0; row < ROWS; row++) sum += parts[row][column];
            out[column] = sum;
        }
    }
}
