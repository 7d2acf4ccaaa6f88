// Arrays without rows: every thread takes WIDTH elements at a time, and what is left at the end one by one.
#pragma once
#include "common.cuh"

// work.at<N>(i) for the elements i … i + N - 1, until all are done
template <class Work> __device__ __forceinline__ void over_elements(int64_t size, Work work) {
    int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
    int64_t packs = size / WIDTH;
    for (int64_t i = first; i < packs; i += step) work.template at<WIDTH>(i * WIDTH);
    for (int64_t i = packs * WIDTH + first; i < size; i += step) work.template at<1>(i);
}
