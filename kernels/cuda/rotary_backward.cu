// The backward of rotary.cu where there is a gain: mlm_mpi/ops/rotary.py. Memory-bound: two heads read, one written.
#include "rotary.cuh"

// One half of a slot: n = x inverse, sums += g n; returns the part of sum(g gain n). g becomes g gain, x becomes n.
__device__ __forceinline__ float weigh(Floats &g, Floats &x, const WEIGHT *gain, float inverse, Floats &sums) {
    auto scale = load<WIDTH>(gain);
    float along = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        x.at[i] *= inverse;
        sums.at[i] += g.at[i] * x.at[i];
        g.at[i] *= scale.at[i];
        along += g.at[i] * x.at[i];
    }
    return along;
}

__device__ __forceinline__ void finish(ELEMENT *dx, Floats g, const Floats &n, float slope, float inverse) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) g.at[i] = (g.at[i] - n.at[i] * slope) * inverse;
    store(dx, g);
}

// dx, which may be dy: turned back, then (g gain - n mean(g gain n)) inverse with n = x inverse. Block (b, s, k) has
// `each` rows of piece b div count, whatever the GPU, of them the groups of share s, of these the queries (k = 0) or the
// key; parts[b, s, k] are its sums of g n, which columns.cu joins. `rows`: of a piece. `groups`: of a share.
extern "C" __global__ void __launch_bounds__(THREADS) rotary_backward(
    const ELEMENT *dy, Strides from, const ELEMENT *x, Strides of_x, const float *cos, const float *sin,
    const WEIGHT *gain, const float *inverses, ELEMENT *dx, Strides to, float *parts, Shape shape, int rows, int each,
    int count, unsigned groups) {
    int piece = blockIdx.x / count * rows, begin = piece + blockIdx.x % count * each;
    int end = max(begin, min(piece + rows, begin + each));
    unsigned units = blockIdx.z ? 1 : shape.units - 1, first_unit = blockIdx.z ? shape.units - 1 : 0;
    gain += blockIdx.z * shape.width;
    Floats sums_a[SLOTS] = {}, sums_b[SLOTS] = {};
    unsigned heads = unsigned(end - begin) * groups * units;  // none where another block has the last row
    for (unsigned first = 0; first < heads; first += HEADS) {
        unsigned local = first + threadIdx.x / LANES;
        bool mine = local < heads;
        if (!mine) local = 0;
        unsigned row = unsigned(begin) + local / (groups * units);
        unsigned within = local % (groups * units), group = blockIdx.y * groups + within / units;
        unsigned number = (row * shape.groups + group) * shape.units + first_unit + within % units;
        Head head(shape, number);
        float inverse = inverses[number], along = 0.0f;
        const ELEMENT *dy_at = dy + head.in(from), *x_at = x + head.in(of_x);
        ELEMENT *dx_at = dx + head.in(to);
        Floats ga[SLOTS], gb[SLOTS], xa[SLOTS], xb[SLOTS];
        over_slots(shape, mine, [&](int s, Slot slot) {
            ga[s] = load<WIDTH>(dy_at + slot.first), xa[s] = load<WIDTH>(x_at + slot.first);
            if (slot.turns) {
                gb[s] = load<WIDTH>(dy_at + slot.second), xb[s] = load<WIDTH>(x_at + slot.second);
                turn(ga[s], gb[s], cos, sin, -1.0f, shape, head.t, slot.first);
                along += weigh(gb[s], xb[s], gain + slot.second, inverse, sums_b[s]);
            }
            along += weigh(ga[s], xa[s], gain + slot.first, inverse, sums_a[s]);
        });
        float slope = head_sum(along) / shape.width;
        over_slots(shape, mine, [&](int s, Slot slot) {
            finish(dx_at + slot.first, ga[s], xa[s], slope, inverse);
            if (slot.turns) finish(dx_at + slot.second, gb[s], xb[s], slope, inverse);
        });
    }
    // over the block's threads that have the same elements, in order
    constexpr int SPAN = 2 * SLOTS * LANES * WIDTH;
    __shared__ __align__(16) float left[HEADS][SPAN];
    over_slots(shape, true, [&](int s, Slot slot) {
        float *mine = left[threadIdx.x / LANES];
        *reinterpret_cast<Floats *>(mine + slot.first) = sums_a[s];
        if (slot.turns) *reinterpret_cast<Floats *>(mine + slot.second) = sums_b[s];
    });
    __syncthreads();
    float *part = parts + ((int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * 2 + blockIdx.z) * shape.width;
    for (int i = threadIdx.x; i < shape.width; i += THREADS) {
        float sum = 0.0f;
        for (int h = 0; h < HEADS; h++) sum += left[h][i];
        part[i] = sum;
    }
}
