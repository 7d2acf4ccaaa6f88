// Layer normalisation over rows: mlm_mpi/ops/layernorm.py. A row is read once and kept in registers.
#include "rows.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, 1024 / BLOCK) layernorm_forward(
    const ELEMENT *x, const WEIGHT *gain, const WEIGHT *bias, float epsilon, ELEMENT *y, float *means, float *inverses,
    int64_t rows, int columns) {
    int64_t row = int64_t(blockIdx.x) * ROWS + threadIdx.y;
    int mine = row < rows ? columns : 0;  // behind the last row a thread only takes part in sums
    Pack<float, WIDTH> held[PACKS];
    float sum = 0.0f, squares = 0.0f;
    over_packs(mine, [&](int p, int column) { held[p] = load<WIDTH>(x + row * columns + column); });
    over_packs(mine, [&](int p, int) {
        for (float each : held[p].at) sum += each;
    });
    float mean = row_sum(sum) / columns;
    over_packs(mine, [&](int p, int) {
        for (float each : held[p].at) squares += (each - mean) * (each - mean);
    });
    float inverse = 1.0f / sqrtf(row_sum(squares) / columns + epsilon);
    over_packs(mine, [&](int p, int column) {
        auto scale = load<WIDTH>(gain + column), shift = load<WIDTH>(bias + column);
        for (int i = 0; i < WIDTH; i++) held[p].at[i] = (held[p].at[i] - mean) * inverse * scale.at[i] + shift.at[i];
        store(y + row * columns + column, held[p]);
    });
    if (mine && threadIdx.x == 0) means[row] = mean, inverses[row] = inverse;
}

// dx = (g - mean(g) - n mean(g n)) / deviation, plus `add` where given; g = dy gain, n = normalised x.
// Block b has `each` rows of piece b div count, whatever the GPU; parts[b] are their sums (dgain, dbias) per column,
// which columns.cu joins. `rows`: of a piece.
extern "C" __global__ void __launch_bounds__(BLOCK, 512 / BLOCK) layernorm_backward(
    const ELEMENT *dy, const ELEMENT *x, const WEIGHT *gain, const float *means, const float *inverses,
    const ELEMENT *add, ELEMENT *dx, float *parts, int64_t rows, int64_t each, int count, int columns) {
    Pack<float, WIDTH> gains[PACKS] = {}, biases[PACKS] = {};
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
        float mean = mine ? means[row] : 0.0f, inverse = mine ? inverses[row] : 0.0f;
        float sum = 0.0f, along = 0.0f;
        over_packs(mine, [&](int p, int column) {
            auto scale = load<WIDTH>(gain + column);
            for (int i = 0; i < WIDTH; i++) {
                float d = to_float(dys[p].at[i]), normal = (to_float(xs[p].at[i]) - mean) * inverse;
                float g = d * scale.at[i];
                sum += g, along += g * normal;
                gains[p].at[i] += d * normal, biases[p].at[i] += d;
            }
        });
        float middle = row_sum(sum) / columns, slope = row_sum(along) / columns;
        over_packs(mine, [&](int p, int column) {
            auto scale = load<WIDTH>(gain + column);
            Pack<float, WIDTH> out = {};
            if (add) out = load<WIDTH>(add + offset + column);
            for (int i = 0; i < WIDTH; i++) {
                float normal = (to_float(xs[p].at[i]) - mean) * inverse;
                out.at[i] += (to_float(dys[p].at[i]) * scale.at[i] - middle - normal * slope) * inverse;
            }
            store(dx + offset + column, out);
        });
    }
    float *part = parts + int64_t(blockIdx.x) * 2 * columns;
    leave(gains, part, columns);
    leave(biases, part + columns, columns);
}
