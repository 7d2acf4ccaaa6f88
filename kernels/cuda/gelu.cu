// GELU in its tanh form, forward and backward: mlm_mpi/ops/gelu.py. Memory-bound: one read (two), one write.
#include "common.cuh"

constexpr float ROOT = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float CUBIC = 0.044715f;

// x sigma(2u) equals half x (1 + tanh u): one exponential, and no cancellation for large negative x
__device__ __forceinline__ float gate(float x) { return 1.0f / (1.0f + __expf(-2.0f * ROOT * x * (1.0f + CUBIC * x * x))); }

__device__ __forceinline__ float slope(float x) {
    float sigma = gate(x);
    float du = ROOT * (1.0f + 3.0f * CUBIC * x * x);
    return sigma + 2.0f * x * sigma * (1.0f - sigma) * du;
}

template <class F> __device__ __forceinline__ void over_elements(int64_t size, F body) {
    int64_t step = int64_t(gridDim.x) * blockDim.x;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += step) body(i);
}

extern "C" __global__ void gelu_forward(const ELEMENT *x, ELEMENT *y, int64_t size) {
    over_elements(size, [=](int64_t i) {
        float value = to_float(x[i]);
        y[i] = from_float<ELEMENT>(value * gate(value));
    });
}
