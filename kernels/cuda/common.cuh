// What every kernel uses: the bfloat16 type, elements of either type as floats, sums over a warp and a block.
//
// A source is compiled once per element type and, where it matters, per shape: -DELEMENT=float or -DELEMENT=bf16.
// Arithmetic is float32; bfloat16 is how numbers are stored.
#pragma once
#include "ptx.cuh"

#define NAN_F __int_as_float(0x7fffffff)

struct bf16 {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __int_as_float(int(x.bits) << 16); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return bf16{uint16_t(pack_bf16(x, 0.0f))}; }

// N elements that move together: 16 bytes (4 floats or 8 bfloat16) unless said otherwise
template <class T, int N = 16 / sizeof(T)> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
    static constexpr int SIZE = N;
    T at[N];
};

// N elements at `p`, which is aligned to a pack: as they are stored, or as floats.
template <int N, class T> __device__ __forceinline__ Pack<T, N> load_raw(const T *p) {
    return *reinterpret_cast<const Pack<T, N> *>(p);
}
template <int N, class T> __device__ __forceinline__ Pack<float, N> load(const T *p) {
    auto raw = load_raw<N>(p);
    Pack<float, N> x;
#pragma unroll
    for (int i = 0; i < N; i++) x.at[i] = to_float(raw.at[i]);
    return x;
}

// N floats rounded to what is stored at `p`, which is in global memory and aligned to a pack
template <int N> __device__ __forceinline__ void store(float *p, const Pack<float, N> &x) {
    if constexpr (N == 1) {
        *p = x.at[0];
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            store_global16(p + i, __float_as_int(x.at[i]), __float_as_int(x.at[i + 1]), __float_as_int(x.at[i + 2]),
                           __float_as_int(x.at[i + 3]));
        }
    }
}
template <int N> __device__ __forceinline__ void store(bf16 *p, const Pack<float, N> &x) {
    if constexpr (N == 1) {
        *p = from_float<bf16>(x.at[0]);
    } else if constexpr (N == 4) {
        *reinterpret_cast<Pack<uint32_t, 2> *>(p) = {{pack_bf16(x.at[0], x.at[1]), pack_bf16(x.at[2], x.at[3])}};
    } else {
        static_assert(N == 8, "16 bytes at once");
        store_global16(p, pack_bf16(x.at[0], x.at[1]), pack_bf16(x.at[2], x.at[3]), pack_bf16(x.at[4], x.at[5]),
                       pack_bf16(x.at[6], x.at[7]));
    }
}

// The sum over a warp, the same in every lane; the order of additions is fixed.
template <class T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}

// The sum over the MEMBERS warps that share a threadIdx.y (of GROUPS), the same in every thread of them, in the order
// of warps. With more than one warp the whole block has to come here.
template <int MEMBERS, int GROUPS = 1, class T> __device__ __forceinline__ T group_sum(T x) {
    x = warp_sum(x);
    if constexpr (MEMBERS > 1) {
        __shared__ T parts[GROUPS][MEMBERS];
        __syncthreads();  // an earlier sum has been read
        if (threadIdx.x % 32 == 0) parts[threadIdx.y][threadIdx.x / 32] = x;
        __syncthreads();
        x = parts[threadIdx.y][0];
#pragma unroll
        for (int warp = 1; warp < MEMBERS; warp++) x += parts[threadIdx.y][warp];
    }
    return x;
}
