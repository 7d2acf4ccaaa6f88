// What every kernel uses: the bfloat16 type, elements of either type as floats, sums over a warp and a block.
//
// A source is compiled once per element type and, where it matters, per shape: -DELEMENT=float or -DELEMENT=bf16.
// Arithmetic is float32; bfloat16 is how numbers are stored.
#pragma once
#include "ptx.cuh"

struct bf16 {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __int_as_float(int(x.bits) << 16); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return bf16{uint16_t(pack_bf16(x, 0.0f))}; }

// 16 bytes of elements at once: 4 floats or 8 bfloat16
template <class T> struct __align__(16) Pack {
    static constexpr int SIZE = 16 / sizeof(T);
    T at[SIZE];
};

// The sum over a warp, the same in every lane; the order of additions is fixed.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}
