// Sums over the columns of a matrix, in two stages whose cuts depend on the shape alone: linear.bias_gradient, and the
// end of layernorm.backward. A block has 32 x WARPS threads; its warps share the rows, its lanes the columns.
#include "common.cuh"

// out[b, :] = sum of rows b each … (b + 1) each - 1, added to what is there with `accumulate`; b is blockIdx.y
extern "C" __global__ void __launch_bounds__(32 * WARPS) columns_sum(
    const ELEMENT *x, float *out, int64_t rows, int64_t columns, int64_t each, int accumulate) {
    constexpr int STRIP = 32 * WIDTH;
    __shared__ __align__(16) float parts[WARPS][STRIP];
    int64_t strip = int64_t(blockIdx.x) * STRIP, column = strip + threadIdx.x * WIDTH;
    int64_t end = min(rows, (blockIdx.y + 1) * each);
    Pack<float, WIDTH> sum = {};
    if (column < columns) {
#pragma unroll 4
        for (int64_t row = blockIdx.y * each + threadIdx.y; row < end; row += WARPS) {
            auto value = load<WIDTH>(x + row * columns + column);
            for (int i = 0; i < WIDTH; i++) sum.at[i] += value.at[i];
        }
    }
    *reinterpret_cast<Pack<float, WIDTH> *>(parts[threadIdx.y] + threadIdx.x * WIDTH) = sum;
    __syncthreads();
    int mine = threadIdx.y * 32 + threadIdx.x;
    if (mine >= STRIP || strip + mine >= columns) return;
    float total = 0.0f;
    for (int warp = 0; warp < WARPS; warp++) total += parts[warp][mine];
    float *at = out + blockIdx.y * columns + strip + mine;
    *at = accumulate ? *at + total : total;
}

// The second stage, for gridDim.y vectors at once: out_v = sum over b of parts[b, v, :], written or added.
extern "C" __global__ void __launch_bounds__(32 * WARPS) columns_add(
    const float *parts, float *out0, float *out1, int count, int64_t columns, int accumulate) {
    __shared__ float sums[WARPS][32];
    int64_t column = int64_t(blockIdx.x) * 32 + threadIdx.x;
    int each = (count + WARPS - 1) / WARPS, end = min(count, int(threadIdx.y + 1) * each);
    float sum = 0.0f;
    if (column < columns) {
#pragma unroll 8
        for (int b = threadIdx.y * each; b < end; b++) {
            sum += parts[(int64_t(b) * gridDim.y + blockIdx.y) * columns + column];
        }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= columns) return;
    for (int warp = 1; warp < WARPS; warp++) sum += sums[warp][threadIdx.x];
    float *at = (blockIdx.y ? out1 : out0) + column;
    *at = accumulate ? *at + sum : sum;
}
