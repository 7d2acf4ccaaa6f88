// Sums over the columns of a matrix, in two stages whose cuts depend on the number of rows alone: linear.bias_gradient,
// and the end of layernorm.backward. A block has 32 x WARPS threads; its warps share the rows, its lanes the columns.
//
// The rows are `pieces` equal groups, each summed as if there were no other, in `count` parts of `each` rows; then the
// sums of the pieces join in a tree.
#include "tree.cuh"

// out[b, :] = sum of part b mod count of piece b div count, added to what is there with `accumulate`; b is blockIdx.y.
// `rows`: of a piece
extern "C" __global__ void __launch_bounds__(32 * WARPS) columns_sum(
    const ELEMENT *x, float *out, int64_t rows, int64_t columns, int64_t each, int count, int accumulate) {
    constexpr int STRIP = 32 * WIDTH;
    __shared__ __align__(16) float parts[WARPS][STRIP];
    int64_t strip = int64_t(blockIdx.x) * STRIP, column = strip + threadIdx.x * WIDTH;
    int64_t piece = blockIdx.y / count * rows, begin = piece + blockIdx.y % count * each;
    int64_t end = min(piece + rows, begin + each);
    Pack<float, WIDTH> sum = {};
    if (column < columns) {
#pragma unroll 4
        for (int64_t row = begin + threadIdx.y; row < end; row += WARPS) {
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
struct Parts {
    const float *at;  // of this thread's column
    int count;        // of a piece
    int64_t stride;   // from part to part

    // the `group`th of WARPS groups of a piece's parts
    __device__ __forceinline__ float group(int piece, int group) const {
        int each = (count + WARPS - 1) / WARPS, end = min(count, (group + 1) * each);
        float sum = 0.0f;
#pragma unroll 8
        for (int b = group * each; b < end; b++) sum += at[(int64_t(piece) * count + b) * stride];
        return sum;
    }
    __device__ __forceinline__ float piece(int piece) const {
        float sum = group(piece, 0);
        for (int g = 1; g < WARPS; g++) sum += group(piece, g);
        return sum;
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS) columns_add(
    const float *parts, float *out0, float *out1, int count, int pieces, int64_t columns, int accumulate) {
    __shared__ float sums[WARPS][32], waiting[TREE_LEVELS][WARPS][32];
    int lane = threadIdx.x, warp = threadIdx.y;
    int64_t column = int64_t(blockIdx.x) * 32 + lane;
    Parts from{parts + blockIdx.y * columns + column, count, gridDim.y * columns};
    Tree<float, WARPS * 32> tree{&waiting[0][warp][lane]};
    int span = 1;  // pieces of a warp: a whole branch of the tree
    while (span * WARPS < pieces) span *= 2;
    if (column < columns) {
        if (pieces == 1) {
            sums[warp][lane] = from.group(0, warp);
        } else if (warp * span < pieces) {
            for (int piece = warp * span; piece < min(pieces, (warp + 1) * span); piece++) tree.add(from.piece(piece));
            sums[warp][lane] = tree.sum();
        }
    }
    __syncthreads();
    if (warp > 0 || column >= columns) return;
    float sum = sums[0][lane];
    if (pieces == 1) {
        for (int w = 1; w < WARPS; w++) sum += sums[w][lane];
    } else {
        tree = {&waiting[0][0][lane]};
        for (int w = 0; w * span < pieces; w++) tree.add(sums[w][lane]);
        sum = tree.sum();
    }
    float *at = (blockIdx.y ? out1 : out0) + column;
    *at = accumulate ? *at + sum : sum;
}
