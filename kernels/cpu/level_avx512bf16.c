/* Products of bf16 pairs by VDPBF16PS: Cooper Lake (2020), Sapphire Rapids (2023), Zen 4 (2022). Nothing else. */
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11) /* as in dispatch.c */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,prefer-vector-width=512")
#endif
#define ELEMENT bf16
#define LEVEL avx512bf16
#define W 16
#define BF16_INSTRUCTION
#include "common.h"

#include "matmul.c"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
