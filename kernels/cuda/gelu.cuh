// The gate of GELU in its tanh form and its slope: mlm_mpi/ops/gelu.py. y = x gate(x), dy/dx = slope(x).
#pragma once
#include "common.cuh"

constexpr float ROOT = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float CUBIC = 0.044715f;

// x sigma(2u) equals half x (1 + tanh u): one exponential, and no cancellation for large negative x
__device__ __forceinline__ float gate(float x) {
    return __fdividef(1.0f, 1.0f + __expf(-2.0f * ROOT * x * (1.0f + CUBIC * x * x)));
}

__device__ __forceinline__ float slope(float x) {
    float sigma = gate(x);
    float du = ROOT * (1.0f + 3.0f * CUBIC * x * x);
    return sigma + 2.0f * x * sigma * (1.0f - sigma) * du;
}
