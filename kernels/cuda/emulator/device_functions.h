// CUDA's built-in variables and functions that the kernels use, other than those of warp.h.
#pragma once

#define threadIdx (cu::running()->index)
#define blockIdx (cu::block.index)
#define blockDim (cu::block.size)
#define gridDim (cu::block.grid)

inline void __syncthreads(int line = __builtin_LINE()) { cu::block_barrier(false, line); }
inline int __syncthreads_or(int vote, int line = __builtin_LINE()) { return cu::block_barrier(vote, line).any; }
inline int __syncthreads_and(int vote, int line = __builtin_LINE()) { return cu::block_barrier(vote, line).all; }
inline int __syncthreads_count(int vote, int line = __builtin_LINE()) { return cu::block_barrier(vote, line).count; }

inline uint32_t __cvta_generic_to_shared(const void *p) { return cu::shared_offset(p, 0, "a shared-memory address"); }

// ---- memory -----------------------------------------------------------------------------------

inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T> inline T __ldg(const T *at) { return *at; }
template <class T> inline T __ldcs(const T *at) { return *at; }
template <class T, class U> inline void __stcs(T *at, U value) { *at = value; }

namespace cu {
// fibers switch only where they wait, so that a plain read and write is atomic; threads that meet here are ordered
template <class T, class F> inline T atomic(T *at, F change) {
    Quiet quiet;
    acquired(at);
    T old = *at;
    *at = change(old);
    released(at);
    return old;
}
}  // namespace cu
template <class T, class U> inline T atomicAdd(T *at, U value) {
    return cu::atomic(at, [=](T old) { return T(old + T(value)); });
}
template <class T, class U> inline T atomicMax(T *at, U value) {
    return cu::atomic(at, [=](T old) { return T(value) > old ? T(value) : old; });
}
template <class T, class U> inline T atomicMin(T *at, U value) {
    return cu::atomic(at, [=](T old) { return T(value) < old ? T(value) : old; });
}
template <class T, class U> inline T atomicExch(T *at, U value) {
    return cu::atomic(at, [=](T) { return T(value); });
}
template <class T, class U, class V> inline T atomicCAS(T *at, U compare, V value) {
    return cu::atomic(at, [=](T old) { return old == T(compare) ? T(value) : old; });
}

// ---- arithmetic -------------------------------------------------------------------------------
// More exact than the hardware's approximations (a few ulp): a tolerance must allow for those.

using std::isfinite;
using std::isinf;
using std::isnan;
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

inline float __int_as_float(int bits) { return cu::load<float>(&bits); }
inline int __float_as_int(float value) { return cu::load<int>(&value); }
inline float __uint_as_float(unsigned bits) { return cu::load<float>(&bits); }
inline unsigned __float_as_uint(float value) { return cu::load<unsigned>(&value); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
