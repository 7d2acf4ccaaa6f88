// Normalisation of rows by their root mean square: mlm_mpi/ops/rmsnorm.py. A row is read once and kept in registers.
#include "rows.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, 1024 / BLOCK) rmsnorm_forward(
    const ELEMENT *x, const WEIGHT *gain, float epsilon, ELEMENT *y, float *inverses, int64_t rows, int columns) {
    int64_t row = int64_t(blockIdx.x) * ROWS + threadIdx.y;
    int mine = row < rows ? columns : 0;  // behind the last row a thread only takes part in sums
    Pack<float, WIDTH> held[PACKS];
    float squares = 0.0f;
    over_packs(mine, [&](int p, int column) { held[p] = load<WIDTH>(x + row * columns + column); });
    over_packs(mine, [&](int p, int) {
        for (float each : held[p].at) squares += each * each;
    });
    float inverse = 1.0f / sqrtf(row_sum(squares) / columns + epsilon);
    over_packs(mine, [&](int p, int column) {
        auto scale = load<WIDTH>(gain + column);
        for (int i = 0; i < WIDTH; i++) held[p].at[i] *= inverse * scale.at[i];
        store(y + row * columns + column, held[p]);
    });
    if (mine && threadIdx.x == 0) inverses[row] = inverse;
}

// dx = (g - n mean(g n)) inverse, plus `add` where given; g = dy gain, n = x inverse. Parts as in layernorm.cu, of dgain
// alone.
extern "C" __global__ void __launch_bounds__(BLOCK, 512 / BLOCK) rmsnorm_backward(
    const ELEMENT *dy, const ELEMENT *x, const WEIGHT *gain, const float *inverses, const ELEMENT *add, ELEMENT *dx,
    float *parts, int64_t rows, int64_t each, int count, int columns) {
    Pack<float, WIDTH> gains[PACKS] = {};
    int64_t piece = blockIdx.x / count * rows, begin = piece + blockIdx.x % count * each;
    int64_t end = min(piece + rows, begin + each);
    for (int64_t first = begin; first < end; first += ROWS) {
        int64_t row = first + threadIdx.y;
        int mine = row < end ? columns : 0;
        int64_t offset = row * columns;
        Pack<ELEMENT, WIDTH> xs[PACKS], dys[PACKS];  // as stored: bfloat16 takes half the registers of floats
        over_packs(mine, [&](int p, int column) {
            xs[p] = load_raw<WIDTH>(x + offset + column);
            dys[p] = load_raw<WIDTH>(dy + offset + column);
        });
        float inverse = mine ? inverses[row] : 0.0f, along = 0.0f;
        over_packs(mine, [&](int p, int column) {
            auto scale = load<WIDTH>(gain + column);
            for (int i = 0; i < WIDTH; i++) {
                float d = to_float(dys[p].at[i]), normal = to_float(xs[p].at[i]) * inverse;
                along += d * scale.at[i] * normal;
                gains[p].at[i] += d * normal;
            }
        });
        float slope = row_sum(along) / columns;
        over_packs(mine, [&](int p, int column) {
            auto scale = load<WIDTH>(gain + column);
            Pack<float, WIDTH> out = {};
            if (add) out = load<WIDTH>(add + offset + column);
            for (int i = 0; i < WIDTH; i++) {
                float normal = to_float(xs[p].at[i]) * inverse;
                out.at[i] += (to_float(dys[p].at[i]) * scale.at[i] - normal * slope) * inverse;
            }
            store(dx + offset + column, out);
        });
    }
    leave(gains, parts + int64_t(blockIdx.x) * columns, columns);
}
