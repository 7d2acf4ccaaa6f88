// Sums in the order of a tree: ((s0 + s1) + (s2 + s3)) + …, split at the largest power of two below their number, as in
// mlm_mpi/comm/tree.py.
#pragma once
#include "common.cuh"

__device__ __forceinline__ float plus(float x, float y) { return x + y; }
template <int N> __device__ __forceinline__ Pack<float, N> plus(Pack<float, N> x, const Pack<float, N> &y) {
#pragma unroll
    for (int i = 0; i < N; i++) x.at[i] += y.at[i];
    return x;
}

constexpr int TREE_LEVELS = 16;  // fewer than 2^16 terms

// Takes one term after another, as a binary counter counts: a sum waits until there is another of as many terms. Those
// of a thread lie in shared memory, THREADS apart, because registers cannot be indexed.
template <class T, int THREADS> struct Tree {
    T *waiting;
    int count = 0, held = 0;

    __device__ __forceinline__ void add(T x) {
        for (int n = count++; n & 1; n >>= 1) x = plus(waiting[--held * THREADS], x);
        waiting[held++ * THREADS] = x;
    }
    // of one term or more; what is left waits in the order of its terms, the fewest last
    __device__ __forceinline__ T sum() {
        T x = waiting[--held * THREADS];
        while (held > 0) x = plus(waiting[--held * THREADS], x);
        return x;
    }
};
