// Sums of squares in float64, one per block of elements: mlm_mpi/params/clip.py. A thread block takes one.
#include "common.cuh"

constexpr int THREADS = 32 * WARPS;

extern "C" __global__ void __launch_bounds__(THREADS) clip_squares(
    const float *x, double *out, int64_t size, int64_t block) {
    int64_t begin = blockIdx.x * block, end = min(size, begin + block);
    double sum = 0.0;
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x * WIDTH; i + WIDTH <= end; i += THREADS * WIDTH) {
        auto value = load<WIDTH>(x + i);
        for (float each : value.at) sum += double(each) * each;
    }
    int64_t left = end - (end - begin) % WIDTH + threadIdx.x;
    if (left < end) sum += double(x[left]) * x[left];
    sum = group_sum<WARPS>(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
