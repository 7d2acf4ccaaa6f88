// Squared ReLU, forward and backward: mlm_mpi/ops/relu2.py. Memory-bound: one read (two), one write.
#include "flat.cuh"
#include "relu2.cuh"

struct Forward {
    const ELEMENT *x;
    ELEMENT *y;

    template <int N> __device__ __forceinline__ void at(int64_t i) const {
        auto value = load<N>(x + i);
        for (float &each : value.at) each = positive(each) * positive(each);
        store(y + i, value);
    }
};

struct Backward {
    const ELEMENT *dy, *x;
    ELEMENT *dx;

    template <int N> __device__ __forceinline__ void at(int64_t i) const {
        auto value = load<N>(x + i), gradient = load<N>(dy + i);
        for (int k = 0; k < N; k++) gradient.at[k] *= 2.0f * positive(value.at[k]);
        store(dx + i, gradient);
    }
};

extern "C" __global__ void relu2_forward(const ELEMENT *x, ELEMENT *y, int64_t size) {
    over_elements(size, Forward{x, y});
}

// dx may be dy
extern "C" __global__ void relu2_backward(const ELEMENT *dy, const ELEMENT *x, ELEMENT *dx, int64_t size) {
    over_elements(size, Backward{dy, x, dx});
}
