// An array in another element type, rounded to nearest even: mlm_mpi/ops/cast.py. FROM and TO are float and bf16.
#include "flat.cuh"

struct Cast {
    const FROM *x;
    TO *out;

    template <int N> __device__ __forceinline__ void at(int64_t i) const { store(out + i, load<N>(x + i)); }
};

extern "C" __global__ void cast_to(const FROM *x, TO *out, int64_t size) { over_elements(size, Cast{x, out}); }
