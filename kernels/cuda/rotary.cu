// Queries and keys, normalised if there is a gain (NORMAL), and turned by their positions: mlm_mpi/ops/rotary.py.
// Memory-bound: a head is read once, written once.
#include "rotary.cuh"

__device__ __forceinline__ float squares(const Floats &x) {
    float sum = 0.0f;
#pragma unroll
    for (float each : x.at) sum += each * each;
    return sum;
}

// y may be x. Turns back with a sign of -1: the backward without a gain.
extern "C" __global__ void __launch_bounds__(THREADS) rotary_forward(
    const ELEMENT *x, Strides from, const float *cos, const float *sin, float sign, const WEIGHT *gain, float epsilon,
    ELEMENT *y, Strides to, float *inverses, Shape shape) {
    unsigned number = blockIdx.x * HEADS + threadIdx.x / LANES;
    bool mine = number < shape.heads;  // behind the last head a thread only takes part in sums
    Head head(shape, mine ? number : 0);
    x += head.in(from), y += head.in(to);
    Floats a[SLOTS], b[SLOTS];
    over_slots(shape, mine, [&](int s, Slot slot) {
        a[s] = load<WIDTH>(x + slot.first);
        if (slot.turns) b[s] = load<WIDTH>(x + slot.second);
    });
    if constexpr (NORMAL) {
        float sum = 0.0f;
        over_slots(shape, mine, [&](int s, Slot slot) { sum += squares(a[s]) + (slot.turns ? squares(b[s]) : 0.0f); });
        float inverse = 1.0f / sqrtf(head_sum(sum) / shape.width + epsilon);
        if (mine && threadIdx.x % LANES == 0) inverses[number] = inverse;
        gain += head.u == shape.units - 1 ? shape.width : 0;
        over_slots(shape, mine, [&](int s, Slot slot) {
            auto scale = load<WIDTH>(gain + slot.first);
            for (int i = 0; i < WIDTH; i++) a[s].at[i] *= inverse * scale.at[i];
            if (!slot.turns) return;
            scale = load<WIDTH>(gain + slot.second);
            for (int i = 0; i < WIDTH; i++) b[s].at[i] *= inverse * scale.at[i];
        });
    }
    over_slots(shape, mine, [&](int s, Slot slot) {
        if (slot.turns) turn(a[s], b[s], cos, sin, sign, shape, head.t, slot.first);
        store(y + slot.first, a[s]);
        if (slot.turns) store(y + slot.second, b[s]);
    });
}
