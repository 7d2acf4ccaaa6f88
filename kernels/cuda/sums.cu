// Arrays added element by element in the order of a tree (mlm_mpi/backend/sums.py), every one read once.
// COUNT leaves, at most 16; after leaf i the two newest sums become one, {MERGES}[i] times.
#include "flat.cuh"

struct Tree {
    const float *leaves[COUNT];
    float *out;

    template <int N> __device__ __forceinline__ void at(int64_t i) const {
        constexpr int merges[] = {MERGES};
        Pack<float, N> sums[COUNT];  // in registers: after unrolling every index is a constant
        int held = 0;
#pragma unroll
        for (int leaf = 0; leaf < COUNT; leaf++) {
            sums[held++] = load<N>(leaves[leaf] + i);
#pragma unroll
            for (int merge = 0; merge < merges[leaf]; merge++) {
                held--;
#pragma unroll
                for (int k = 0; k < N; k++) sums[held - 1].at[k] += sums[held].at[k];
            }
        }
        store(out + i, sums[0]);
    }
};

// out may be one of the leaves
extern "C" __global__ void sums_tree(
    const float *p0, const float *p1, const float *p2, const float *p3, const float *p4, const float *p5,
    const float *p6, const float *p7, const float *p8, const float *p9, const float *p10, const float *p11,
    const float *p12, const float *p13, const float *p14, const float *p15, float *out, int64_t size) {
    const float *all[16] = {p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15};
    Tree tree;
#pragma unroll
    for (int i = 0; i < COUNT; i++) tree.leaves[i] = all[i];
    tree.out = out;
    over_elements(size, tree);
}
