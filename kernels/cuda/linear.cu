// What a product is added to: the bias, plus a residual where given, in every row (mlm_mpi/ops/linear.py).
// A block of (32, rows at a time) threads keeps WIDTH columns a lane.
#include "common.cuh"

extern "C" __global__ void linear_start(
    const ELEMENT *b, const ELEMENT *residual, ELEMENT *y, int64_t rows, int64_t columns) {
    int64_t column = (int64_t(blockIdx.x) * 32 + threadIdx.x) * WIDTH, step = int64_t(gridDim.y) * blockDim.y;
    if (column >= columns) return;
    auto bias = load<WIDTH>(b + column);
    for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows; row += step) {
        auto value = bias;
        if (residual) {
            auto other = load<WIDTH>(residual + row * columns + column);
            for (int i = 0; i < WIDTH; i++) value.at[i] += other.at[i];
        }
        store(y + row * columns + column, value);
    }
}
