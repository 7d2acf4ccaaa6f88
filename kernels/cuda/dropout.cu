// Dropout by a mask that is drawn, never stored: mlm_mpi/ops/dropout.py.
#include "flat.cuh"
#include "philox.cuh"

struct Mask {
    Draw draw;
    uint64_t start;
    ELEMENT *out;

    template <int N> __device__ __forceinline__ void at(int64_t i) const {
        store(out + i, dropout_factors<N>(draw, start + i));
    }
};

// y = x times the mask, plus residual where given
struct Product {
    Draw draw;
    const ELEMENT *x, *residual;
    ELEMENT *y;

    template <int N> __device__ __forceinline__ void at(int64_t i) const {
        auto value = load<N>(x + i), factors = dropout_factors<N>(draw, i);
        Pack<float, N> other = {};
        if (residual) other = load<N>(residual + i);
        for (int k = 0; k < N; k++) value.at[k] = value.at[k] * factors.at[k] + other.at[k];
        store(y + i, value);
    }
};

extern "C" __global__ void dropout_mask(
    uint32_t key0, uint32_t key1, uint32_t step, uint32_t micro_batch, float rate, float factor, uint64_t start,
    ELEMENT *out, int64_t size) {
    over_elements(size, Mask{{key0, key1, step, micro_batch, rate, factor}, start, out});
}

extern "C" __global__ void dropout_forward(
    uint32_t key0, uint32_t key1, uint32_t step, uint32_t micro_batch, float rate, float factor, const ELEMENT *x,
    const ELEMENT *residual, ELEMENT *y, int64_t size) {
    over_elements(size, Product{{key0, key1, step, micro_batch, rate, factor}, x, residual, y});
}
