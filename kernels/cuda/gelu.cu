// GELU in its tanh form, forward and backward: mlm_mpi/ops/gelu.py. Memory-bound: one read (two), one write.
#include "flat.cuh"

constexpr float ROOT = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float CUBIC = 0.044715f;

// x sigma(2u) equals half x (1 + tanh u): one exponential, and no cancellation for large negative x
__device__ __forceinline__ float gate(float x) {
    return __fdividef(1.0f, 1.0f + __expf(-2.0f * ROOT * x * (1.0f + CUBIC * x * x)));
}

__device__ __forceinline__ float slope(float x) {
    float sigma = gate(x);
    float du = ROOT * (1.0f + 3.0f * CUBIC * x * x);
    return sigma + 2.0f * x * sigma * (1.0f - sigma) * du;
}

struct Forward {
    const ELEMENT *x;
    ELEMENT *y;

    template <int N> __device__ __forceinline__ void at(int64_t i) const {
        auto value = load<N>(x + i);
        for (float &each : value.at) each *= gate(each);
        store(y + i, value);
    }
};

struct Backward {
    const ELEMENT *dy, *x;
    ELEMENT *dx;

    template <int N> __device__ __forceinline__ void at(int64_t i) const {
        auto value = load<N>(x + i), gradient = load<N>(dy + i);
        for (int k = 0; k < N; k++) gradient.at[k] *= slope(value.at[k]);
        store(dx + i, gradient);
    }
};

extern "C" __global__ void gelu_forward(const ELEMENT *x, ELEMENT *y, int64_t size) {
    over_elements(size, Forward{x, y});
}

// dx may be dy
extern "C" __global__ void gelu_backward(const ELEMENT *dy, const ELEMENT *x, ELEMENT *dx, int64_t size) {
    over_elements(size, Backward{dy, x, dx});
}
