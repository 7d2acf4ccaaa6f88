/* AVX2 and FMA: x86-64 CPUs since Haswell (2013) and Zen (2017). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define LEVEL avx2
#define W 8
#include "ops.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
