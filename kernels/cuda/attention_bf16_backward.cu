// Flash attention backward in bfloat16 on tensor cores of compute capability 8.0 and above, after Dao,
// arXiv:2307.08691, but in two kernels: one owns keys and sums dk and dv over queries, one owns queries and sums dq
// over keys. Probabilities are so computed twice, 7 products in place of 5; in return each sum lies in one thread's
// registers and has one order, where the one-kernel form adds to dq by atomics or lets blocks wait for each other.
//
// Both hold the rows they own in shared memory, stream the others through two stages, and go over a stage in chunks.
// The keys' kernel computes scores transposed, rows being keys: so both leave their weights in the registers that the
// next product wants.
//
// Slopes are the rows of do, and their products with values the gradients of weights; bends are those of scores.
#include "attention_mma.cuh"

// two bands share every fragment; beside the sums of a wider head, Philox or first keys, there is room for one
constexpr int BANDS = HEAD == 64 && !DROPOUT && !STARTS ? 2 : 1;
constexpr int OWNED = 128;
constexpr int WARPS = OWNED / (16 * BANDS), THREADS = 32 * WARPS;
constexpr int STREAMED = HEAD == 64 ? 64 : 32;
constexpr int CHUNK = 32, BLOCKS = CHUNK / 8;
constexpr int MIN_BLOCKS = BANDS;
static_assert(BANDS * BLOCKS * 4 <= 32, "a chunk's bits of dropout fit into one register");

using Product = float[BANDS][BLOCKS][4];

// Of a product the pairs of bfloat16, in the layout of the left operand of the next: [band][column / 16].
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

// The warp's first row among those that the block owns, this thread's first below it, and its first column of block n.
__device__ __forceinline__ int own_row() { return warp() * BANDS * 16; }
__device__ __forceinline__ int row_of(int m, int half) { return m * 16 + half * 8 + lane() / 4; }
__device__ __forceinline__ int column_of(int n) { return n * 8 + lane() % 4 * 2; }

// left rightᵀ, of the warp's rows of a tile and a chunk of a streamed one
__device__ __forceinline__ void multiply_chunk(bf16 *owned, bf16 *streamed, int chunk, Product &out) {
    auto left = [&](int step, uint32_t(&a)[BANDS][4]) { left_fragments(owned, own_row(), step, a); };
    multiply<2>(left, streamed, chunk, out);
}

// dropout's factor of a weight
__device__ __forceinline__ float factor_of(const Problem &p, uint32_t kept, int m, int n, int e) {
    return !DROPOUT ? 1.0f : is_kept<BLOCKS>(kept, m, n, e) ? p.draw.factor : 0.0f;
}

// Ones over the halves of a pair, elements e and e + 1, that are kept.
__device__ __forceinline__ uint32_t pair_mask(uint32_t kept, int m, int n, int e) {
    return (is_kept<BLOCKS>(kept, m, n, e) ? 0xffffu : 0u) | (is_kept<BLOCKS>(kept, m, n, e + 1) ? 0xffff0000u : 0u);
}

// Bends of queries of row b from `query` on and keys from `key` on, out of scores and gradients of weights; all of these
// queries see the keys before `all`, if they see the first of a chunk.
__device__ __forceinline__ void bend_queries(
    const Problem &p, int b, int query, int key, int length, int all, const Statistics (&of)[BANDS][2], uint32_t kept,
    const Product &score, const Product &slope, Pairs &bends) {
    const bool whole = key + CHUNK <= all && !p.hides(b, query + BANDS * 16 - 1, key);
#pragma unroll
    for (int m = 0; m < BANDS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int limit = p.limit(query + row_of(m, half), length), start = p.start(b, query + row_of(m, half));
#pragma unroll
            for (int n = 0; n < BLOCKS; n++) {
                float bend[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int i = half * 2 + e;
                    const int column = key + column_of(n) + e;
                    bool seen = whole || (column < limit && (!STARTS || column >= start));
                    float weight = exp2_approx(score[m][n][i] * p.scale_2() - of[m][half].level);
                    float given = slope[m][n][i] * factor_of(p, kept, m, n, i);
                    bend[e] = seen ? weight * (given - of[m][half].delta) : 0.0f;
                }
                bends.at(m, n, half) = pack_bf16(bend[0], bend[1]);
            }
        }
}

// Weights of keys of row b from `key` on (rows) and queries from `query` on (columns), whose statistics begin at `of`.
__device__ __forceinline__ void weigh_keys(
    const Problem &p, int b, int key, int query, int length, const Statistics *of, const Product &score, Pairs &weights) {
    const bool whole = key + BANDS * 16 <= p.limit(query, length) && !p.hides(b, query + CHUNK - 1, key);
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
        const int t = column_of(n);
        const float level[2] = {of[t].level, of[t + 1].level};
        const int limit[2] = {p.limit(query + t, length), p.limit(query + t + 1, length)};
        const int start[2] = {p.start(b, query + t), p.start(b, query + t + 1)};
#pragma unroll
        for (int m = 0; m < BANDS; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float weight[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    weight[e] = exp2_approx(score[m][n][half * 2 + e] * p.scale_2() - level[e]);
                    const int row = key + row_of(m, half);
                    if (!whole && (row >= limit[e] || (STARTS && row < start[e]))) weight[e] = 0.0f;
                }
                weights.at(m, n, half) = pack_bf16(weight[0], weight[1]);
            }
    }
}

// Bends of the same, out of weights and their gradients.
__device__ __forceinline__ void bend_keys(
    const Problem &p, const Statistics *of, uint32_t kept, const Product &slope, Pairs &weights, Pairs &bends) {
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
        const float delta[2] = {of[column_of(n)].delta, of[column_of(n) + 1].delta};
#pragma unroll
        for (int m = 0; m < BANDS; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = half * 2;
                float left = slope[m][n][i] * factor_of(p, kept, m, n, i) - delta[0];
                float right = slope[m][n][i + 1] * factor_of(p, kept, m, n, i + 1) - delta[1];
                const uint32_t pair = weights.at(m, n, half);
                bends.at(m, n, half) = pack_bf16(low_half(pair) * left, high_half(pair) * right);
            }
    }
}

// One 16-byte piece holds the statistics of two queries.
__device__ __forceinline__ void load_statistics(const Statistics *from, Statistics *to) {
    if (threadIdx.x < STREAMED / 2) cp_async16(to + threadIdx.x * 2, from + threadIdx.x * 2);
}

__device__ __forceinline__ void store_owned(
    const Problem &p, const float (&sum)[BANDS][PIECES][4], float factor, bf16 *tile, const Work &work, const View &to,
    int count) {
    float factors[BANDS][2];
#pragma unroll
    for (int m = 0; m < BANDS; m++) factors[m][0] = factors[m][1] = factor;
    store_rows(sum, factors, tile, own_row(), work.rows(to), to.row, work.tile * OWNED, count, p.width);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention_backward_queries(
    Problem p, View dout, View q, View k, View v, const Statistics *statistics, View dq) {
    DYNAMIC_SMEM(bf16, queries);
    bf16 *slopes = queries + OWNED * HEAD, *stages = slopes + OWNED * HEAD;
    const Work work = work_of(p, p.heads, (p.queries + OWNED - 1) / OWNED, true);
    const int first = work.tile * OWNED, mine = first + own_row(), length = p.length(work.b);
    const int begin = p.start(work.b, first) / STREAMED * STREAMED;
    const int end = p.limit(min(first + OWNED, p.queries) - 1, length);
    // the warp's queries see all keys before `all`, and none from `some` on
    const int all = p.limit(mine, length), some = p.limit(mine + BANDS * 16 - 1, length);
    auto load = [&](int key, int turn) {
        bf16 *stage = stages + turn * 2 * STREAMED * HEAD;
        load_rows<STREAMED, THREADS>(work.rows(k), k.row, key, end, p.width, stage);
        load_rows<STREAMED, THREADS>(work.rows(v), v.row, key, end, p.width, stage + STREAMED * HEAD);
        cp_async_commit();
    };

    load_rows<OWNED, THREADS>(work.rows(q), q.row, first, p.queries, p.width, queries);
    load_rows<OWNED, THREADS>(work.even_rows(dout), dout.row, first, p.queries, p.width, slopes);
    load(begin, 0);
    Statistics of[BANDS][2];
#pragma unroll
    for (int m = 0; m < BANDS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            of[m][half] = statistics[work.padded_row(p) + mine + row_of(m, half)];

    float sum[BANDS][PIECES][4] = {};
    for (int key = begin, turn = 0; key < end; key += STREAMED, turn ^= 1) {
        bf16 *keys = stages + turn * 2 * STREAMED * HEAD, *values = keys + STREAMED * HEAD;
        cp_async_wait<0>();
        __syncthreads();  // this stage is here, and the other is read
        if (key + STREAMED < end) load(key + STREAMED, turn ^ 1);
#pragma unroll 1
        for (int chunk = 0; chunk < STREAMED && key + chunk < some; chunk += CHUNK) {
            if (p.hides(work.b, mine, key + chunk + CHUNK - 1)) continue;  // the warp sees none of these
            const uint32_t kept = kept_bits<BANDS, BLOCKS>(
                [&](int row, int column) { return work.kept(p, mine + row, key + chunk + column); });
            Product score, slope;
            multiply_chunk(queries, keys, chunk, score);
            multiply_chunk(slopes, values, chunk, slope);
            Pairs bends;
            bend_queries(p, work.b, mine, key + chunk, length, all, of, kept, score, slope, bends);
            accumulate<CHUNK>(bends, keys, chunk, sum);
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    store_owned(p, sum, p.scale, queries, work, dq, p.queries);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention_backward_keys(
    Problem p, View dout, View q, View k, View v, const Statistics *statistics, View dk, View dv) {
    DYNAMIC_SMEM(bf16, keys);
    bf16 *values = keys + OWNED * HEAD, *stages = values + OWNED * HEAD;
    Statistics *statistics_stages = reinterpret_cast<Statistics *>(stages + 4 * STREAMED * HEAD);
    Work work = work_of(p, 1, (p.keys + OWNED - 1) / OWNED, false);
    const int first = work.tile * OWNED, mine = first + own_row(), length = p.length(work.b);
    const int begin = first < length ? p.first_query(first) / STREAMED * STREAMED : p.queries;  // hidden: no query
    const int end = p.last_query(work.b, first + OWNED), beyond = work.h + p.heads;
    auto load = [&](const Work &of, int query, int turn) {
        bf16 *stage = stages + turn * 2 * STREAMED * HEAD;
        load_rows<STREAMED, THREADS>(of.rows(q), q.row, query, p.queries, p.width, stage);
        load_rows<STREAMED, THREADS>(of.even_rows(dout), dout.row, query, p.queries, p.width, stage + STREAMED * HEAD);
        load_statistics(statistics + of.padded_row(p) + query, statistics_stages + turn * STREAMED);
        cp_async_commit();
    };

    load_rows<OWNED, THREADS>(work.rows(k), k.row, first, length, p.width, keys);
    load_rows<OWNED, THREADS>(work.rows(v), v.row, first, length, p.width, values);
    cp_async_commit();
    if (begin < end) load(work, begin, 0);

    float dkey[BANDS][PIECES][4] = {}, dvalue[BANDS][PIECES][4] = {};
    for (int query = begin, turn = 0; query < end && work.h < beyond; turn ^= 1) {  // one head after another
        bf16 *queries = stages + turn * 2 * STREAMED * HEAD, *slopes = queries + STREAMED * HEAD;
        const Statistics *levels = statistics_stages + turn * STREAMED;
        cp_async_wait<0>();
        __syncthreads();  // this stage is here, and the other is read
        const bool last = query + STREAMED >= end;  // of this head
        const Work next = {work.b, work.h + last, work.g, work.tile};
        const int next_query = last ? begin : query + STREAMED;
        if (next.h < beyond) load(next, next_query, turn ^ 1);
#pragma unroll 1
        for (int chunk = 0; chunk < STREAMED; chunk += CHUNK) {
            if (mine >= p.limit(query + chunk + CHUNK - 1, length)) continue;  // these queries see none of its keys
            if (p.hides(work.b, query + chunk, mine + BANDS * 16 - 1)) continue;
            const uint32_t kept = kept_bits<BANDS, BLOCKS>(
                [&](int row, int column) { return work.kept(p, query + chunk + column, mine + row); });
            // pairs of bfloat16 from the start: as floats the weights would not fit beside the slopes and the sums
            Pairs weights, bends;
            Product product;  // rows are keys, columns queries
            multiply_chunk(keys, queries, chunk, product);
            weigh_keys(p, work.b, mine, query + chunk, length, levels + chunk, product, weights);
            auto kept_weights = [&](int k, uint32_t(&a)[BANDS][4]) {
                weights(k, a);
                if (DROPOUT)
#pragma unroll
                    for (int m = 0; m < BANDS; m++)
#pragma unroll
                        for (int i = 0; i < 4; i++) a[m][i] &= pair_mask(kept, m, k / 8 + i / 2, i % 2 * 2);
            };
            accumulate<CHUNK>(kept_weights, slopes, chunk, dvalue);
            multiply_chunk(values, slopes, chunk, product);
            bend_keys(p, levels + chunk, kept, product, weights, bends);
            accumulate<CHUNK>(bends, queries, chunk, dkey);
        }
        work = next, query = next_query;
    }
    cp_async_wait<0>();
    __syncthreads();
    store_owned(p, dkey, p.scale, keys, work, dk, p.keys);
    store_owned(p, dvalue, DROPOUT ? p.draw.factor : 1.0f, values, work, dv, p.keys);
}
