// Arrays without rows: a thread takes WIDTH elements, and the first threads one each of what is left at the end.
#pragma once
#include "common.cuh"

// work.at<N>(i) for the elements i … i + N - 1
template <class Work> __device__ __forceinline__ void over_elements(int64_t size, Work work) {
    int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, packs = size / WIDTH;
    int64_t left = packs * WIDTH + thread;
    if (thread < packs) work.template at<WIDTH>(thread * WIDTH);
    if (left < size) work.template at<1>(left);
}
