// The positive part, whose square is mlm_mpi/ops/relu2.py's; a NaN stays one.
#pragma once
#include "common.cuh"

__device__ __forceinline__ float positive(float x) { return x < 0.0f ? 0.0f : x; }
