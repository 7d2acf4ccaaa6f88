// Flash attention backward in bfloat16 on Hopper: the two kernels of attention_bf16_backward.cu, by TMA and wgmma.
//
// A consumer issues the products of the next tile before it waits for the sums of the last, so the tensor cores have
// work while it computes weights. Rows, weights and bends (the gradient of the scores) stay in registers.
//
// As in attention_hopper.cu, hidden keys that share a tile with visible ones have to be finite.
#include "attention_wgmma.cuh"

constexpr int STAGES = 4;
constexpr int QUERIES = 64;                  // streamed past the keys
constexpr int KEYS = HEAD == 64 ? 128 : 64;  // streamed past the queries

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_backward_queries(
    Problem p, const __grid_constant__ CUtensorMap dout, const __grid_constant__ CUtensorMap q,
    const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v, const Statistics *statistics,
    const __grid_constant__ CUtensorMap dq) {
    DYNAMIC_SMEM(bf16, queries);
    bf16 *slopes = queries + OWNED * HEAD, *stages = slopes + OWNED * HEAD;
    __shared__ Ring<STAGES> ring;
    __shared__ uint64_t owned_here;
    const Work work = work_of(p, 1, (p.queries + OWNED - 1) / OWNED, true);
    const int first = work.tile * OWNED, length = p.length(work.b);
    const int tiles = (p.limit(min(first + OWNED, p.queries) - 1, length) + KEYS - 1) / KEYS;
    if (threadIdx.x == 0) {
        ring.init();
        mbar_init(&owned_here, 1);
        mbar_fence_init();
    }
    __syncthreads();
    // of keys, their values behind them
    auto place = [&](int tile) { return stages + tile % STAGES * 2 * KEYS * HEAD; };

    const int consumer = warpgroup() - 1;
    if (consumer < 0) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x > 0 || tiles == 0) return;
        mbar_expect_tx(&owned_here, 2 * OWNED * HEAD * 2);
        load_owned(queries, &q, &owned_here, first, work);
        load_owned(slopes, &dout, &owned_here, first, work);
        for (int tile = 0; tile < tiles; tile++) {
            uint64_t *full = ring.open(tile, 2 * KEYS * HEAD * 2);
            load_tile<KEYS>(place(tile), &k, full, tile * KEYS, work);
            load_tile<KEYS>(place(tile) + KEYS * HEAD, &v, full, tile * KEYS, work);
        }
        return;
    }

    setmaxnreg_inc<CONSUMER_REGISTERS>();
    const int begin = first + consumer * ROWS, t = begin + row();
    const int all = p.limit(begin, length);  // all queries of the warpgroup see the keys before this one
    const int limit[2] = {p.limit(t, length), p.limit(t + 8, length)};
    const Statistics of[2] = {statistics[work.padded_row(p) + t], statistics[work.padded_row(p) + t + 8]};
    bf16 *own_queries = queries + consumer * ROWS * HEAD, *own_slopes = slopes + consumer * ROWS * HEAD;
    float sum[HEAD / 2] = {}, score[KEYS / 2], slope[KEYS / 2];
    uint32_t bends[KEYS / 16][4];
    if (tiles > 0) mbar_wait(&owned_here, 0);
    for (int tile = 0; tile < tiles; tile++) {
        ring.wait(tile);
        multiply<KEYS>(own_queries, place(tile), score);
        multiply<KEYS>(own_slopes, place(tile) + KEYS * HEAD, slope);
        wgmma_wait<1>();  // the scores, and the sum of the tile before
        if (tile > 0) ring.release(tile - 1);
        const bool whole = (tile + 1) * KEYS <= all;
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) {
            score[i] = exp2_approx(score[i] * p.scale_2() - of[i / 2 % 2].level);
            if (!whole && tile * KEYS + column(i) >= limit[i / 2 % 2]) score[i] = 0.0f;
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) score[i] *= slope[i] - of[i / 2 % 2].delta;
        pack(score, bends);
        accumulate(bends, place(tile), sum);
    }
    wgmma_wait<0>();
    const float factor[2] = {p.scale, p.scale};
    rescale(sum, factor);
    store_rows(sum, own_queries, &dq, begin, consumer, work);
    tma_store_wait_read<0>();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_backward_keys(
    Problem p, const __grid_constant__ CUtensorMap dout, const __grid_constant__ CUtensorMap q,
    const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
    const __grid_constant__ CUtensorMap statistics, const __grid_constant__ CUtensorMap dk,
    const __grid_constant__ CUtensorMap dv) {
    DYNAMIC_SMEM(bf16, keys);
    bf16 *values = keys + OWNED * HEAD, *stages = values + OWNED * HEAD;
    Statistics *levels = reinterpret_cast<Statistics *>(stages + STAGES * 2 * QUERIES * HEAD);
    __shared__ Ring<STAGES> ring;
    __shared__ uint64_t owned_here;
    const Work work = work_of(p, 1, (p.keys + OWNED - 1) / OWNED, false);
    const int first = work.tile * OWNED, length = p.length(work.b);
    const int skipped = p.first_query(first) / QUERIES;  // tiles of queries that see none of these keys
    const int tiles = first < length ? (p.queries + QUERIES - 1) / QUERIES - skipped : 0;
    if (threadIdx.x == 0) {
        ring.init();
        mbar_init(&owned_here, 1);
        mbar_fence_init();
    }
    __syncthreads();
    // of queries, their slopes behind them
    auto place = [&](int tile) { return stages + tile % STAGES * 2 * QUERIES * HEAD; };

    const int consumer = warpgroup() - 1;
    if (consumer < 0) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x > 0 || tiles <= 0) return;
        mbar_expect_tx(&owned_here, 2 * OWNED * HEAD * 2);
        load_owned(keys, &k, &owned_here, first, work);
        load_owned(values, &v, &owned_here, first, work);
        for (int tile = 0; tile < tiles; tile++) {
            const int query = (skipped + tile) * QUERIES;
            uint64_t *full = ring.open(tile, 2 * QUERIES * HEAD * 2 + QUERIES * int(sizeof(Statistics)));
            load_tile<QUERIES>(place(tile), &q, full, query, work);
            load_tile<QUERIES>(place(tile) + QUERIES * HEAD, &dout, full, query, work);
            tma_load_2d(levels + tile % STAGES * QUERIES, &statistics, full, query * 2, work.b * p.groups + work.h);
        }
        return;
    }

    setmaxnreg_inc<CONSUMER_REGISTERS>();
    const int begin = first + consumer * ROWS, key = begin + row();  // and key + 8
    bf16 *own_keys = keys + consumer * ROWS * HEAD, *own_values = values + consumer * ROWS * HEAD;
    float dkey[HEAD / 2] = {}, dvalue[HEAD / 2] = {}, score[QUERIES / 2], slope[QUERIES / 2];  // rows are keys
    uint32_t weights[QUERIES / 16][4], bends[QUERIES / 16][4];
    if (tiles > 0) mbar_wait(&owned_here, 0);
    for (int tile = 0; tile < tiles; tile++) {
        const int query = (skipped + tile) * QUERIES;
        const Statistics *of = levels + tile % STAGES * QUERIES;
        bf16 *queries = place(tile), *slopes = queries + QUERIES * HEAD;
        ring.wait(tile);
        multiply<QUERIES>(own_keys, queries, score);
        multiply<QUERIES>(own_values, slopes, slope);
        wgmma_wait<1>();  // the scores, and the sums of the tile before
        if (tile > 0) ring.release(tile - 1);
        const bool whole = begin + ROWS <= p.limit(query, length);
#pragma unroll
        for (int i = 0; i < QUERIES / 2; i++) {
            score[i] = exp2_approx(score[i] * p.scale_2() - of[column(i)].level);
            if (!whole && key + i / 2 % 2 * 8 >= p.limit(query + column(i), length)) score[i] = 0.0f;
        }
        pack(score, weights);
        accumulate(weights, slopes, dvalue);
        wgmma_wait<HEAD == 64 ? 1 : 0>();  // the slopes; of a wide head also dvalue, whose weights make room
#pragma unroll
        for (int i = 0; i < QUERIES / 2; i++) score[i] *= slope[i] - of[column(i)].delta;
        pack(score, bends);
        accumulate(bends, queries, dkey);
    }
    wgmma_wait<0>();
    const float factor[2] = {p.scale, p.scale};
    rescale(dkey, factor);
    store_rows(dkey, own_keys, &dk, begin, consumer, work);
    store_rows(dvalue, own_values, &dv, begin, consumer, work);
    tma_store_wait_read<0>();
}
