/* AVX-512 as of Skylake-X (2017) and Zen 4 (2022). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")
#endif
#define LEVEL avx512
#define W 16
#include "ops.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
