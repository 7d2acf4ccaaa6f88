// Flash attention backward in bfloat16 on tensor cores of compute capability 8.0 and above, after Dao,
// arXiv:2307.08691, but in two kernels: one owns keys and sums dk and dv over queries, one owns queries and sums dq
// over keys. Probabilities are so computed twice, 7 products in place of 5; in return each sum lies in one thread's
// registers and has one order, where the one-kernel form adds to dq by atomics or lets blocks wait for each other.
//
// Both hold the rows they own in shared memory, stream the others through two stages, and go over a stage in chunks.
// The keys' kernel computes scores transposed, rows being keys: so both leave their weights in the registers that the
// next product wants.
#include "attention_mma.cuh"

constexpr int BANDS = HEAD == 64 ? 2 : 1;  // two share every fragment; the sums of a wider head leave room for one
constexpr int OWNED = 128;
constexpr int WARPS = OWNED / (16 * BANDS), THREADS = 32 * WARPS;
constexpr int STREAMED = HEAD == 64 ? 64 : 32;
constexpr int CHUNK = 32, BLOCKS = CHUNK / 8;
constexpr int MIN_BLOCKS = HEAD == 64 ? 2 : 1;

// left rightᵀ of the warp's own rows of a tile and of a chunk of a streamed one.
__device__ __forceinline__ void scores_of(
    bf16 *own_rows, bf16 *streamed, int chunk, float (&out)[BANDS][BLOCKS][4]) {
    auto left = [&](int step, uint32_t(&a)[BANDS][4]) { left_fragments(own_rows, warp() * BANDS * 16, step, a); };
    multiply<2>(left, streamed, chunk, out);
}

// Of a chunk's products the pairs of bfloat16, in the layout of the left operand of a product: [band][column / 16].
struct Pairs {
    uint32_t of[BANDS][CHUNK / 16][4];

    // columns 8 n + 2 lane mod 8 and the next, of rows lane div 4 + 8 half
    __device__ uint32_t &at(int m, int n, int half) { return of[m][n / 2][n % 2 * 2 + half]; }
    __device__ void operator()(int k, uint32_t (&a)[BANDS][4]) const {
#pragma unroll
        for (int m = 0; m < BANDS; m++) memcpy(a[m], of[m][k / 16], sizeof a[m]);
    }
};

__device__ __forceinline__ float low_half(uint32_t pair) { return __int_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return __int_as_float(pair & 0xffff0000); }

__device__ __forceinline__ float factor_of(const Problem &p, uint64_t kept, int m, int n, int e) {
    return !DROPOUT ? 1.0f : is_kept<BLOCKS>(kept, m, n, e) ? p.draw.factor : 0.0f;
}

// Ones over the halves of a pair, elements e and e + 1, that are kept.
__device__ __forceinline__ uint32_t pair_mask(uint64_t kept, int m, int n, int e) {
    return (is_kept<BLOCKS>(kept, m, n, e) ? 0xffffu : 0u) | (is_kept<BLOCKS>(kept, m, n, e + 1) ? 0xffff0000u : 0u);
}

// One 16-byte piece holds the statistics (attention.cu) of two queries.
__device__ __forceinline__ void load_statistics(const Statistics *from, Statistics *to) {
    if (threadIdx.x < STREAMED / 2) cp_async16(to + threadIdx.x * 2, from + threadIdx.x * 2);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention_backward_queries(
    Problem p, View dout, View q, View k, View v, const Statistics *statistics, View dq) {
    DYNAMIC_SMEM(bf16, queries);
    bf16 *slopes = queries + OWNED * HEAD, *stages = slopes + OWNED * HEAD;
    const Work work = work_of(p, (p.queries + OWNED - 1) / OWNED, true);
    const int first = work.tile * OWNED, own = warp() * BANDS * 16, length = p.length(work.b);
    const int end = p.limit(min(first + OWNED, p.queries) - 1, length);
    // the warp's queries see all keys before `all`, and none from `some` on
    const int all = p.limit(first + own, length), some = p.limit(first + own + BANDS * 16 - 1, length);
    auto load = [&](int key, bf16 *stage) {
        load_rows<STREAMED, THREADS>(work.rows(k), k.row, key, end, p.width, stage);
        load_rows<STREAMED, THREADS>(work.rows(v), v.row, key, end, p.width, stage + STREAMED * HEAD);
        cp_async_commit();
    };

    load_rows<OWNED, THREADS>(work.rows(q), q.row, first, p.queries, p.width, queries);
    load_rows<OWNED, THREADS>(work.rows(dout), dout.row, first, p.queries, p.width, slopes);
    load(0, stages);
    Statistics own_statistics[BANDS][2];
#pragma unroll
    for (int m = 0; m < BANDS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            own_statistics[m][half] =
                statistics[work.padded_row(p) + first + own + m * 16 + half * 8 + lane() / 4];

    float sum[BANDS][PIECES][4] = {};
    for (int key = 0, turn = 0; key < end; key += STREAMED, turn ^= 1) {
        bf16 *keys = stages + turn * 2 * STREAMED * HEAD, *values = keys + STREAMED * HEAD;
        cp_async_wait<0>();
        __syncthreads();  // this stage is here, and the other is read
        if (key + STREAMED < end) load(key + STREAMED, stages + (turn ^ 1) * 2 * STREAMED * HEAD);
#pragma unroll 1
        for (int chunk = 0; chunk < STREAMED && key + chunk < some; chunk += CHUNK) {
            const uint64_t kept = kept_bits<BANDS, BLOCKS>(
                [&](int row, int column) { return work.kept(p, first + own + row, key + chunk + column); });
            float score[BANDS][BLOCKS][4], slope[BANDS][BLOCKS][4];
            scores_of(queries, keys, chunk, score);
            scores_of(slopes, values, chunk, slope);
            const bool whole = key + chunk + CHUNK <= all;
            Pairs bends;
#pragma unroll
            for (int m = 0; m < BANDS; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const Statistics &of = own_statistics[m][half];
                    int limit = p.limit(first + own + m * 16 + half * 8 + lane() / 4, length);
#pragma unroll
                    for (int n = 0; n < BLOCKS; n++) {
                        float bent[2];
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            bool seen = whole || key + chunk + n * 8 + lane() % 4 * 2 + e < limit;
                            float weight = exp2_approx(score[m][n][half * 2 + e] * p.scale_2() - of.level);
                            float given = slope[m][n][half * 2 + e] * factor_of(p, kept, m, n, half * 2 + e);
                            bent[e] = seen ? weight * (given - of.delta) : 0.0f;
                        }
                        bends.at(m, n, half) = pack_bf16(bent[0], bent[1]);
                    }
                }
            accumulate<CHUNK>(bends, keys, chunk, sum);
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    float factor[BANDS][2];
#pragma unroll
    for (int m = 0; m < BANDS; m++) factor[m][0] = factor[m][1] = p.scale;
    store_rows(sum, factor, queries, own, work.rows(dq), dq.row, first, p.queries, p.width);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention_backward_keys(
    Problem p, View dout, View q, View k, View v, const Statistics *statistics, View dk, View dv) {
    DYNAMIC_SMEM(bf16, keys);
    bf16 *values = keys + OWNED * HEAD, *stages = values + OWNED * HEAD;
    Statistics *statistics_stages = reinterpret_cast<Statistics *>(stages + 4 * STREAMED * HEAD);
    const Work work = work_of(p, (p.keys + OWNED - 1) / OWNED, false);
    const int first = work.tile * OWNED, own = warp() * BANDS * 16, length = p.length(work.b);
    const int begin = first < length ? p.first_query(first) / STREAMED * STREAMED : p.queries;  // hidden: no query
    auto load = [&](int query, int turn) {
        bf16 *stage = stages + turn * 2 * STREAMED * HEAD;
        load_rows<STREAMED, THREADS>(work.rows(q), q.row, query, p.queries, p.width, stage);
        load_rows<STREAMED, THREADS>(work.rows(dout), dout.row, query, p.queries, p.width, stage + STREAMED * HEAD);
        load_statistics(statistics + work.padded_row(p) + query, statistics_stages + turn * STREAMED);
        cp_async_commit();
    };

    load_rows<OWNED, THREADS>(work.rows(k), k.row, first, length, p.width, keys);
    load_rows<OWNED, THREADS>(work.rows(v), v.row, first, length, p.width, values);
    cp_async_commit();
    if (begin < p.queries) load(begin, 0);

    float dkey[BANDS][PIECES][4] = {}, dvalue[BANDS][PIECES][4] = {};
    for (int query = begin, turn = 0; query < p.queries; query += STREAMED, turn ^= 1) {
        bf16 *queries = stages + turn * 2 * STREAMED * HEAD, *slopes = queries + STREAMED * HEAD;
        const Statistics *levels = statistics_stages + turn * STREAMED;
        cp_async_wait<0>();
        __syncthreads();  // this stage is here, and the other is read
        if (query + STREAMED < p.queries) load(query + STREAMED, turn ^ 1);
#pragma unroll 1
        for (int chunk = 0; chunk < STREAMED; chunk += CHUNK) {
            if (first + own >= p.limit(query + chunk + CHUNK - 1, length)) continue;  // too late for all of them
            const bool whole = first + own + BANDS * 16 <= p.limit(query + chunk, length);
            // pairs of bfloat16 from the start: as floats the weights would not fit beside the slopes and the sums
            Pairs weights, bends;
            const uint64_t kept = kept_bits<BANDS, BLOCKS>(
                [&](int row, int column) { return work.kept(p, query + chunk + column, first + own + row); });
            float score[BANDS][BLOCKS][4];  // rows are keys, columns queries
            scores_of(keys, queries, chunk, score);
#pragma unroll
            for (int n = 0; n < BLOCKS; n++) {
                const int t = chunk + n * 8 + lane() % 4 * 2;
                const float level[2] = {levels[t].level, levels[t + 1].level};
                const int limit[2] = {p.limit(query + t, length), p.limit(query + t + 1, length)};
#pragma unroll
                for (int m = 0; m < BANDS; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int key = first + own + m * 16 + half * 8 + lane() / 4;
                        float weight[2];
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            weight[e] = exp2_approx(score[m][n][half * 2 + e] * p.scale_2() - level[e]);
                            if (!whole && key >= limit[e]) weight[e] = 0.0f;
                        }
                        weights.at(m, n, half) = pack_bf16(weight[0], weight[1]);
                    }
            }
            auto kept_weights = [&](int k, uint32_t(&a)[BANDS][4]) {
                weights(k, a);
                if (DROPOUT)
#pragma unroll
                    for (int m = 0; m < BANDS; m++)
#pragma unroll
                        for (int i = 0; i < 4; i++) a[m][i] &= pair_mask(kept, m, k / 8 + i / 2, i % 2 * 2);
            };
            accumulate<CHUNK>(kept_weights, slopes, chunk, dvalue);
            scores_of(values, slopes, chunk, score);
            auto given = [&](int m, int n, int e) { return score[m][n][e] * factor_of(p, kept, m, n, e); };
#pragma unroll
            for (int n = 0; n < BLOCKS; n++) {
                const int t = chunk + n * 8 + lane() % 4 * 2;
                const float delta[2] = {levels[t].delta, levels[t + 1].delta};
#pragma unroll
                for (int m = 0; m < BANDS; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        bends.at(m, n, half) = pack_bf16(
                            low_half(weights.at(m, n, half)) * (given(m, n, half * 2) - delta[0]),
                            high_half(weights.at(m, n, half)) * (given(m, n, half * 2 + 1) - delta[1]));
            }
            accumulate<CHUNK>(bends, queries, chunk, dkey);
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    const float value_scale = DROPOUT ? p.draw.factor : 1.0f;
    float factor[BANDS][2], value_factor[BANDS][2];
#pragma unroll
    for (int m = 0; m < BANDS; m++)
        factor[m][0] = factor[m][1] = p.scale, value_factor[m][0] = value_factor[m][1] = value_scale;
    store_rows(dkey, factor, keys, own, work.rows(dk), dk.row, first, p.keys, p.width);
    store_rows(dvalue, value_factor, values, own, work.rows(dv), dv.row, first, p.keys, p.width);
}
