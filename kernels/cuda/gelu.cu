// GELU in its tanh form, forward and backward: mlm_mpi/ops/gelu.py. Memory-bound: one read (two), one write.
#include "gelu.cuh"

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
