// The gated product of SwiGLU, forward and backward: mlm_mpi/ops/swiglu.py. Memory-bound: two reads (three), one write
// (two). Rows of x are n gates a, then n numbers b; a block's x goes along a row, its y over rows.
#include "common.cuh"

// 1 / (1 + exp(-a)) by one exponential
__device__ __forceinline__ float sigmoid(float a) { return __fdividef(1.0f, 1.0f + __expf(-a)); }

// body(column): WIDTH elements of this thread; a row has a multiple of that
template <class F> __device__ __forceinline__ void over_row(int n, F body) {
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (column < n) body(column);
}

extern "C" __global__ void swiglu_forward(const ELEMENT *x, ELEMENT *y, int64_t rows, int n) {
    over_row(n, [&](int column) {
        for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
            const ELEMENT *from = x + row * 2 * n + column;
            auto a = load<WIDTH>(from), b = load<WIDTH>(from + n);
            for (int i = 0; i < WIDTH; i++) a.at[i] *= sigmoid(a.at[i]) * b.at[i];
            store(y + row * n + column, a);
        }
    });
}

// da = dy b (s + a s (1 - s)), db = dy a s; dx may be x
extern "C" __global__ void swiglu_backward(const ELEMENT *dy, const ELEMENT *x, ELEMENT *dx, int64_t rows, int n) {
    over_row(n, [&](int column) {
        for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
            int64_t at = row * 2 * n + column;
            auto a = load<WIDTH>(x + at), b = load<WIDTH>(x + at + n), d = load<WIDTH>(dy + row * n + column);
            for (int i = 0; i < WIDTH; i++) {
                float s = sigmoid(a.at[i]), silu = a.at[i] * s;
                a.at[i] = d.at[i] * b.at[i] * (s + silu * (1.0f - s));
                b.at[i] = d.at[i] * silu;
            }
            store(dx + at, a);
            store(dx + at + n, b);
        }
    });
}
