// Dropout by a mask that is drawn, never stored: mlm_mpi/ops/dropout.py.
#include "flat.cuh"
#include "philox.cuh"

// CUT: the array is a cut of the global one; else a run of its elements
__device__ __forceinline__ uint64_t element(const Cut &cut, int64_t i) { return CUT ? cut.element(i) : cut.start + i; }

struct Mask {
    Draw draw;
    Cut cut;
    ELEMENT *out;

    template <int N> __device__ __forceinline__ void at(int64_t i) const {
        store(out + i, dropout_factors<N>(draw, element(cut, i)));
    }
};

// y = x times the mask, plus residual where given
struct Product {
    Draw draw;
    Cut cut;
    const ELEMENT *x, *residual;
    ELEMENT *y;

    template <int N> __device__ __forceinline__ void at(int64_t i) const {
        auto value = load<N>(x + i), factors = dropout_factors<N>(draw, element(cut, i));
        Pack<float, N> other = {};
        if (residual) other = load<N>(residual + i);
        for (int k = 0; k < N; k++) value.at[k] = value.at[k] * factors.at[k] + other.at[k];
        store(y + i, value);
    }
};

extern "C" __global__ void dropout_mask(Draw draw, Cut cut, ELEMENT *out, int64_t size) {
    over_elements(size, Mask{draw, cut, out});
}

extern "C" __global__ void dropout_forward(
    Draw draw, Cut cut, const ELEMENT *x, const ELEMENT *residual, ELEMENT *y, int64_t size) {
    over_elements(size, Product{draw, cut, x, residual, y});
}
