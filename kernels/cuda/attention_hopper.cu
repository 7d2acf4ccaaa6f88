// Flash attention forward in bfloat16 on Hopper, after Shah et al., "FlashAttention-3", arXiv:2407.08608.
//
// Two warpgroups multiply, 64 queries each, and take turns: while one has its scores turned into weights, the products
// of the other keep the tensor cores busy (ping-pong, §3.1). Within a warpgroup the scores of the next keys are
// computed while the weights of the last meet their values (§3.2).
//
// Keys beyond a row's length, where they share a tile with keys before it, are read and weighed zero: their values
// have to be finite.
#include "attention_wgmma.cuh"

constexpr int KEYS = 128;
constexpr int STAGES = HEAD == 64 ? 4 : 2;
constexpr int TURN = STORE + CONSUMERS;  // the first of the named barriers by which they take turns

// Online softmax of a thread's two rows.
struct Softmax {
    float top[2] = {-INFINITY_F, -INFINITY_F}, total[2] = {0.0f, 0.0f};

    // Scores become weights 2^(scale (score − top)); `change` is by what all before has to be multiplied. The first
    // tile shows every query a key, so the top is finite from then on.
    __device__ void update(float (&score)[KEYS / 2], float scale, float (&change)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest = top[half];
#pragma unroll
            for (int i = half * 2; i < KEYS / 2; i += 4) highest = fmaxf(highest, fmaxf(score[i], score[i + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
            float base = highest * scale, added = 0.0f;
            change[half] = exp2_approx(top[half] * scale - base);
            top[half] = highest;
#pragma unroll
            for (int i = half * 2; i < KEYS / 2; i += 4)
#pragma unroll
                for (int e = i; e < i + 2; e++) {
                    score[e] = exp2_approx(score[e] * scale - base);
                    added += score[e];
                }
            total[half] = total[half] * change[half] + added;
        }
    }

    // the whole row's, from the four lanes that share it
    __device__ float whole(int half) const {
        float sum = total[half] + __shfl_xor_sync(~0u, total[half], 1);
        return sum + __shfl_xor_sync(~0u, sum, 2);
    }
};

// Scores that query `t`, or the one 8 later, may not see become −∞.
__device__ __forceinline__ void hide(const Problem &p, int t, int key, int length, float (&score)[KEYS / 2]) {
    const int limit[2] = {p.limit(t, length), p.limit(t + 8, length)};
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
        if (key + column(i) >= limit[i / 2 % 2]) score[i] = -INFINITY_F;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_forward(
    Problem p, const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
    const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap o, float *lse) {
    DYNAMIC_SMEM(bf16, queries);
    bf16 *keys = queries + OWNED * HEAD, *values = keys + STAGES * KEYS * HEAD;
    __shared__ Ring<STAGES> key_ring, value_ring;
    __shared__ uint64_t queries_here;
    const Work work = work_of(p, 1, (p.queries + OWNED - 1) / OWNED, true);
    const int first = work.tile * OWNED, length = p.length(work.b);
    const int tiles = (p.limit(min(first + OWNED, p.queries) - 1, length) + KEYS - 1) / KEYS;
    if (threadIdx.x == 0) {
        key_ring.init();
        value_ring.init();
        mbar_init(&queries_here, 1);
        mbar_fence_init();
    }
    __syncthreads();
    auto place = [](bf16 *stages, int tile) { return stages + tile % STAGES * KEYS * HEAD; };

    const int consumer = warpgroup() - 1;
    if (consumer < 0) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x > 0 || tiles == 0) return;
        auto load_keys = [&](int tile) {
            uint64_t *full = key_ring.open(tile, KEYS * HEAD * 2);
            load_tile<KEYS>(place(keys, tile), &k, full, tile * KEYS, work);
        };
        mbar_expect_tx(&queries_here, OWNED * HEAD * 2);
        load_owned(queries, &q, &queries_here, first, work);
        load_keys(0);
        for (int tile = 0; tile < tiles; tile++) {
            if (tile + 1 < tiles) load_keys(tile + 1);
            uint64_t *full = value_ring.open(tile, KEYS * HEAD * 2);
            load_tile<KEYS>(place(values, tile), &v, full, tile * KEYS, work);
        }
        return;
    }

    setmaxnreg_inc<CONSUMER_REGISTERS>();
    const int begin = first + consumer * ROWS, t = begin + row();
    const int all = p.limit(begin, length);  // all queries of the warpgroup see the keys before this one
    bf16 *own = queries + consumer * ROWS * HEAD;
    auto wait_turn = [&] { named_barrier_sync(TURN + consumer, 256); };
    auto pass_turn = [&](int tile) {
        if (consumer == 0 || tile < tiles - 1) named_barrier_arrive(TURN + (consumer ^ 1), 256);
    };
    Softmax softmax;
    float sum[HEAD / 2] = {}, score[KEYS / 2], change[2];
    uint32_t weights[KEYS / 16][4];
    auto weigh = [&](int tile) {
        if ((tile + 1) * KEYS > all) hide(p, t, tile * KEYS, length, score);
        softmax.update(score, p.scale_2(), change);
    };

    if (tiles > 0) {
        if (consumer == 1) named_barrier_arrive(TURN, 256);  // the other begins
        mbar_wait(&queries_here, 0);
        key_ring.wait(0);
        wait_turn();
        multiply<KEYS>(own, keys, score);
        pass_turn(0);
        wgmma_wait<0>();
        key_ring.release(0);
        weigh(0);
        pack(score, weights);
        for (int tile = 1; tile < tiles; tile++) {
            key_ring.wait(tile);
            wait_turn();
            multiply<KEYS>(own, place(keys, tile), score);
            value_ring.wait(tile - 1);
            accumulate(weights, place(values, tile - 1), sum);
            pass_turn(tile);
            wgmma_wait<1>();
            key_ring.release(tile);
            weigh(tile);
            wgmma_wait<0>();
            value_ring.release(tile - 1);
            rescale(sum, change);
            pack(score, weights);
        }
        value_ring.wait(tiles - 1);
        accumulate(weights, place(values, tiles - 1), sum);
        wgmma_wait<0>();
    }

    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = softmax.whole(half);
        factor[half] = tiles > 0 ? 1.0f / total : 0.0f;
        if (threadIdx.x % 4 == 0 && t + half * 8 < p.queries)
            lse[work.row(p) + t + half * 8] = tiles > 0 ? softmax.top[half] * p.scale + logf(total) : -INFINITY_F;
    }
    rescale(sum, factor);
    store_rows(sum, own, &o, begin, consumer, work);
    tma_store_wait_read<0>();
}
