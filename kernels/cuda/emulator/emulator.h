// Runs CUDA C++ kernels on a CPU, for tests: g++ -x c++ -include emulator.h kernel.cu. README.md says what that can show.
#pragma once
#define CU_CPU 1
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <utility>
#include <vector>

// ---- the language -----------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static  // a red zone around each array
#else
#define __shared__ static __attribute__((section("cu_shared")))  // filled with NaN before each block; wants -fno-weak
#endif
#define DYNAMIC_SMEM(T, name) T *name = reinterpret_cast<T *>(cu::block.shared)

struct int2 {
    int x, y;
} __align__(8);
struct int4 {
    int x, y, z, w;
} __align__(16);
struct uint2 {
    unsigned x, y;
} __align__(8);
struct uint3 {
    unsigned x, y, z;
};
struct uint4 {
    unsigned x, y, z, w;
} __align__(16);
struct float2 {
    float x, y;
} __align__(8);
struct float3 {
    float x, y, z;
};
struct float4 {
    float x, y, z, w;
} __align__(16);
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- the machine ------------------------------------------------------------------------------

#include "sanitizers.h"
#include "execution.h"
#include "warp.h"
#include "async.h"
#include "matrix.h"
#include "hopper.h"
#include "launch.h"
#include "device_functions.h"
