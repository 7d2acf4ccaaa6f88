// Arrays added element by element in the one order of comm/reduction.py: mlm_mpi/ops/sums.py. COUNT arrays, at most 8.
#include "flat.cuh"

__device__ constexpr int largest_power_below(int n) {
    int power = 1;
    while (2 * power < n) power *= 2;
    return power;
}

struct Tree {
    const float *parts[COUNT];
    float *out;

    template <int FIRST, int STOP, int N> __device__ __forceinline__ Pack<float, N> sum(int64_t i) const {
        if constexpr (STOP - FIRST == 1) {
            return load<N>(parts[FIRST] + i);
        } else {
            constexpr int MIDDLE = FIRST + largest_power_below(STOP - FIRST);
            auto left = sum<FIRST, MIDDLE, N>(i), right = sum<MIDDLE, STOP, N>(i);
            for (int k = 0; k < N; k++) left.at[k] += right.at[k];
            return left;
        }
    }
    template <int N> __device__ __forceinline__ void at(int64_t i) const { store(out + i, sum<0, COUNT, N>(i)); }
};

// out may be one of the parts
extern "C" __global__ void sums_tree(
    const float *p0, const float *p1, const float *p2, const float *p3, const float *p4, const float *p5,
    const float *p6, const float *p7, float *out, int64_t size) {
    const float *all[8] = {p0, p1, p2, p3, p4, p5, p6, p7};
    Tree tree;
#pragma unroll
    for (int i = 0; i < COUNT; i++) tree.parts[i] = all[i];
    tree.out = out;
    over_elements(size, tree);
}
