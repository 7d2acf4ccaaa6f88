// What every backward kernel needs of a query: the log-sum-exp of its scores in base 2, and Σ do·o. Memory-bound.
#include "attention.cuh"

constexpr int THREADS = 256;
constexpr int LANES = 8;  // of a query: with 16 bytes each, a head of 64 bfloat16

// Queries beyond the last of a head get zeros.
extern "C" __global__ void __launch_bounds__(THREADS) attention_statistics(
    Problem p, View dout, View o, const float *lse, Statistics *statistics) {
    const int rows = (p.queries + PADDED - 1) / PADDED * PADDED;
    const int64_t i = int64_t(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
    const int t = i % rows, head = i / rows, heads = p.groups * p.heads;
    const Work work = {head / heads, head % heads, 0, 0};
    float delta = 0.0f;
    if (t < p.queries) {
        const ELEMENT *left = work.even_rows(dout) + t * dout.row, *right = work.even_rows(o) + t * o.row;
        for (int c = threadIdx.x % LANES * PACK; c < p.width; c += LANES * PACK) {
            auto a = load<PACK>(left + c), b = load<PACK>(right + c);
#pragma unroll
            for (int n = 0; n < PACK; n++) delta += a.at[n] * b.at[n];
        }
    }
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) delta += __shfl_xor_sync(~0u, delta, distance);
    if (threadIdx.x % LANES == 0)
        statistics[i] = t < p.queries ? Statistics{lse[work.row(p) + t] * LOG2_E, delta} : Statistics{};
}
