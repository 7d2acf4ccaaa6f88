// Flash attention forward in bfloat16 on tensor cores of compute capability 8.0 and above, after Dao, arXiv:2307.08691.
//
// A warp owns 32 queries: two bands share every fragment of keys and values, because with one the reads of shared
// memory would take as long as the products. One tile of keys and one of values lie in shared memory: the next keys
// arrive while probabilities meet the values, the values while queries meet the keys, so each has a whole product's
// time, and two blocks fit on a processor.
#include "attention_mma.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int BANDS = DROPOUT || STARTS ? 1 : 2;  // beside Philox or first keys there is room for one
constexpr int QUERIES = WARPS * BANDS * 16;
constexpr int KEYS = HEAD == 64 ? 64 : 48;  // as many as leave the registers of a thread unspilled
constexpr int BLOCKS = KEYS / 8;
constexpr bool KEEP = HEAD == 64;  // the queries' fragments in registers; those of a wider head do not fit

// Over the 4 lanes that hold a row.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Online softmax of the queries of a warp.
struct Softmax {
    float top[BANDS][2], total[BANDS][2];  // the highest score so far; this lane's part of the sum

    __device__ Softmax() {
#pragma unroll
        for (int m = 0; m < BANDS; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) top[m][half] = -INFINITY_F, total[m][half] = 0.0f;
    }

    // Scores become weights 2^(scale (score − top)); what was summed before is rescaled to the new top. The first
    // tile shows every query a key, and the top is finite from then on, but for queries with a first key.
    __device__ void update(
        float (&score)[BANDS][BLOCKS][4], float scale, float (&sum)[BANDS][PIECES][4]) {
#pragma unroll
        for (int m = 0; m < BANDS; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float highest = top[m][half];
#pragma unroll
                for (int n = 0; n < BLOCKS; n++)
                    highest = fmaxf(highest, fmaxf(score[m][n][half * 2], score[m][n][half * 2 + 1]));
                highest = row_max(highest);
                float base = STARTS && highest == -INFINITY_F ? 0.0f : highest * scale, change = exp2_approx(top[m][half] * scale - base), added = 0.0f;
                top[m][half] = highest;
#pragma unroll
                for (int n = 0; n < BLOCKS; n++) {
                    float &left = score[m][n][half * 2], &right = score[m][n][half * 2 + 1];
                    left = exp2_approx(left * scale - base), right = exp2_approx(right * scale - base);
                    added += left + right;
                }
                total[m][half] = total[m][half] * change + added;
#pragma unroll
                for (int c = 0; c < PIECES; c++) sum[m][c][half * 2] *= change, sum[m][c][half * 2 + 1] *= change;
            }
    }
};

// Scores of keys from `key` on that a query of row b may not see become −∞; `query` is the warp's first.
__device__ __forceinline__ void hide(
    const Problem &p, int b, int query, int key, int length, float (&score)[BANDS][BLOCKS][4]) {
#pragma unroll
    for (int m = 0; m < BANDS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int t = query + m * 16 + half * 8 + lane() / 4, limit = p.limit(t, length), start = p.start(b, t);
#pragma unroll
            for (int n = 0; n < BLOCKS; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int column = key + n * 8 + lane() % 4 * 2 + e;
                    if (column >= limit || (STARTS && column < start)) score[m][n][half * 2 + e] = -INFINITY_F;
                }
        }
}

__device__ __forceinline__ void drop(uint64_t kept, float factor, float (&weight)[BANDS][BLOCKS][4]) {
#pragma unroll
    for (int m = 0; m < BANDS; m++)
#pragma unroll
        for (int n = 0; n < BLOCKS; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) weight[m][n][e] *= is_kept<BLOCKS>(kept, m, n, e) ? factor : 0.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_forward(
    Problem p, View q, View k, View v, View o, float *lse) {
    DYNAMIC_SMEM(bf16, queries);
    bf16 *keys = queries + QUERIES * HEAD, *values = keys + KEYS * HEAD;
    const Work work = work_of(p, p.heads, (p.queries + QUERIES - 1) / QUERIES, true);
    const int first = work.tile * QUERIES, own = warp() * BANDS * 16, length = p.length(work.b);
    const int begin = p.start(work.b, first) / KEYS * KEYS, end = p.limit(min(first + QUERIES, p.queries) - 1, length);
    // the warp's queries see all keys before `all`, and none from `some` on
    const int all = p.limit(first + own, length), some = p.limit(first + own + BANDS * 16 - 1, length);

    load_rows<QUERIES, THREADS>(work.rows(q), q.row, first, p.queries, p.width, queries);
    cp_async_commit();
    load_rows<KEYS, THREADS>(work.rows(k), k.row, begin, end, p.width, keys);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    uint32_t kept[KEEP ? STEPS : 4][BANDS][4];
    if constexpr (KEEP)
#pragma unroll
        for (int step = 0; step < STEPS; step++) left_fragments(queries, own, step, kept[step]);
    auto fragments = [&](int step, uint32_t(&a)[BANDS][4]) {
        if constexpr (KEEP) memcpy(a, kept[step], sizeof a);
        else left_fragments(queries, own, step, a);
    };

    Softmax softmax;
    float sum[BANDS][PIECES][4] = {};
    for (int key = begin; key < end; key += KEYS) {
        cp_async_wait<0>();
        __syncthreads();  // the keys are here, and the values of the tile before are read
        load_rows<KEYS, THREADS>(work.rows(v), v.row, key, end, p.width, values);
        cp_async_commit();
        const uint64_t kept = kept_bits<BANDS, BLOCKS>(
            [&](int row, int column) { return work.kept(p, first + own + row, key + column); });
        float score[BANDS][BLOCKS][4];
        multiply<KEEP ? STEPS : 4>(fragments, keys, 0, score);
        cp_async_wait<0>();
        __syncthreads();  // the values are here, and the keys are read
        if (key + KEYS < end) load_rows<KEYS, THREADS>(work.rows(k), k.row, key + KEYS, end, p.width, keys);
        cp_async_commit();
        if (key >= some || p.hides(work.b, first + own, key + KEYS - 1)) continue;
        if (key + KEYS > all || p.hides(work.b, first + own + BANDS * 16 - 1, key))
            hide(p, work.b, first + own, key, length, score);
        softmax.update(score, p.scale_2(), sum);
        if (DROPOUT) drop(kept, p.draw.factor, score);
        auto weights = [&](int k, uint32_t(&a)[BANDS][4]) {
#pragma unroll
            for (int m = 0; m < BANDS; m++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    a[m][i] = pack_bf16(score[m][k / 8 + i / 2][i % 2 * 2], score[m][k / 8 + i / 2][i % 2 * 2 + 1]);
        };
        accumulate<KEYS>(weights, values, 0, sum);
    }
    cp_async_wait<0>();

    float factor[BANDS][2];
#pragma unroll
    for (int m = 0; m < BANDS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int t = first + own + m * 16 + half * 8 + lane() / 4;
            float total = row_sum(softmax.total[m][half]);
            const bool blind = STARTS ? total == 0.0f : end <= 0;  // sees no key
            factor[m][half] = blind ? 0.0f : 1.0f / total;
            if (lane() % 4 == 0 && t < p.queries)
                lse[work.row(p) + t] = !blind ? softmax.top[m][half] * p.scale + logf(total) : -INFINITY_F;
        }
    store_rows(sum, factor, queries, own, work.even_rows(o), o.row, first, p.queries, p.width);
}
