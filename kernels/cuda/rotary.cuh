// What rotary.cu and rotary_backward.cu share: which heads, and which elements of them, a thread has.
//
// LANES neighbouring threads of a warp have a head. Its elements are *slots*: WIDTH pairs (i, i + half), half of them at
// each place, or WIDTH elements behind the pairs. A thread has the slots lane, lane + LANES, … : SLOTS of them at most.
#pragma once
#include "common.cuh"

constexpr int HEADS = THREADS / LANES;  // of a block at a time

struct Shape {
    unsigned heads;  // batch, length, groups and units together
    unsigned length, groups, units;
    int width, half;
};

// Element (b, t, g, u, 0) of an array lies at these strides.
struct Strides {
    int64_t b, t, g, u;
};

struct Head {
    unsigned b, t, g, u;

    __device__ __forceinline__ Head(const Shape &shape, unsigned number) {
        u = number % shape.units, number /= shape.units;
        g = number % shape.groups, number /= shape.groups;
        t = number % shape.length, b = number / shape.length;
    }
    __device__ __forceinline__ int64_t in(const Strides &strides) const {
        return b * strides.b + t * strides.t + g * strides.g + u * strides.u;
    }
};

using Floats = Pack<float, WIDTH>;

// A slot: where its two halves lie, of which there is the first alone where `turns` is 0.
struct Slot {
    int first, second, turns;

    __device__ __forceinline__ Slot(const Shape &shape, int number) {
        int pairs = shape.half / WIDTH;
        turns = number < pairs;
        first = turns ? number * WIDTH : 2 * shape.half + (number - pairs) * WIDTH;
        second = first + shape.half;
    }
};

// body(s, slot) for the slots of this thread
template <class F> __device__ __forceinline__ void over_slots(const Shape &shape, bool mine, F body) {
    int count = mine ? (shape.width - shape.half) / WIDTH : 0;
#pragma unroll
    for (int s = 0; s < SLOTS; s++) {
        int number = s * LANES + threadIdx.x % LANES;
        if (number < count) body(s, Slot(shape, number));
    }
}

// The sum over the threads of a head, the same in each of them.
__device__ __forceinline__ float head_sum(float x) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// a and b of a slot, turned by the angles at `t`, or back with a sign of -1.
__device__ __forceinline__ void turn(
    Floats &a, Floats &b, const float *cos, const float *sin, float sign, const Shape &shape, int t, int first) {
    auto c = load<WIDTH>(cos + int64_t(t) * shape.half + first), s = load<WIDTH>(sin + int64_t(t) * shape.half + first);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        float x = a.at[i], y = b.at[i], z = s.at[i] * sign;
        a.at[i] = x * c.at[i] - y * z;
        b.at[i] = y * c.at[i] + x * z;
    }
}
