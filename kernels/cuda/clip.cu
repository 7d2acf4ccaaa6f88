// Sums of squares in float64, one per block of elements: mlm_mpi/params/clip.py. A thread block takes one.
//
// A thread takes four elements at a time, and where it finds them (any address; rows `pitch` apart, of `columns`
// elements) does not change in which order it adds them.
#include "common.cuh"

constexpr int THREADS = 32 * WARPS, RUN = 4;

struct Elements {
    const float *from;
    int64_t columns, pitch;

    __device__ __forceinline__ const float *at(int64_t i) const {
        if (columns == pitch) return from + i;
        return from + uint32_t(i) / uint32_t(columns) * pitch + uint32_t(i) % uint32_t(columns);
    }
    __device__ __forceinline__ Pack<float, RUN> run(int64_t i) const {
        if constexpr (VECTOR) {
            return load<RUN>(at(i));  // within a row
        } else {
            Pack<float, RUN> x;
            for (int e = 0; e < RUN; e++) x.at[e] = *at(i + e);
            return x;
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) clip_squares(
    const float *x, double *out, int64_t size, int64_t block, int64_t columns, int64_t pitch) {
    Elements elements{x, columns, pitch};
    int64_t begin = blockIdx.x * block, end = min(size, begin + block);
    double sum = 0.0;
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x * RUN; i + RUN <= end; i += THREADS * RUN) {
        auto value = elements.run(i);
        for (float each : value.at) sum += double(each) * each;
    }
    int64_t left = end - (end - begin) % RUN + threadIdx.x;
    if (left < end) {
        float value = *elements.at(left);
        sum += double(value) * value;
    }
    sum = group_sum<WARPS>(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
