// Flash attention forward in bfloat16 on Hopper, after Shah et al., "FlashAttention-3", arXiv:2407.08608.
//
// A warpgroup loads by TMA, two multiply by wgmma, 64 queries each, and take turns: while one has its scores turned
// into weights, the products of the other keep the tensor cores busy (ping-pong, §3.1). Within a warpgroup the scores
// of the next keys are computed while the weights of the last meet their values (§3.2).
//
// Keys beyond a row's length, where they share a tile with keys before it, are read and weighed zero: their values
// have to be finite.
#include "attention.cuh"

constexpr int CONSUMERS = 2, THREADS = 128 * (CONSUMERS + 1);
constexpr int ROWS = 64;  // queries of a warpgroup
constexpr int QUERIES = CONSUMERS * ROWS;
constexpr int KEYS = 128;
constexpr int STAGES = 2;
constexpr int HALVES = HEAD / 64;  // columns that a swizzle of 128 bytes spans
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
constexpr int TURN = 1, STORE = 3;  // named barriers, one per consumer each

struct Ring {
    uint64_t full[STAGES], empty[STAGES];

    __device__ void init() {
        for (int i = 0; i < STAGES; i++) mbar_init(&full[i], 1), mbar_init(&empty[i], CONSUMERS * 4);
    }
    __device__ void wait_empty(int tile) { mbar_wait(&empty[tile % STAGES], (tile / STAGES & 1) ^ 1); }
    __device__ void wait_full(int tile) { mbar_wait(&full[tile % STAGES], tile / STAGES & 1); }
    // a warp knows of its own products only: each of them says so
    __device__ void release(int tile) {
        if (threadIdx.x % 32 == 0) mbar_arrive(&empty[tile % STAGES]);
    }
};

// Tiles of keys, or of values, as they come.
__device__ __forceinline__ void load_stage(
    Ring &ring, int tile, const CUtensorMap *map, const Work &work, bf16 *stages) {
    ring.wait_empty(tile);
    uint64_t *full = &ring.full[tile % STAGES];
    mbar_expect_tx(full, KEYS * HEAD * 2);
    stages += tile % STAGES * KEYS * HEAD;
    for (int half = 0; half < HALVES; half++)
        tma_load_4d(stages + half * KEYS * 64, map, full, half * 64, tile * KEYS, work.h, work.b);
}

// Online softmax of two rows a thread, rows lane div 4 and lane div 4 + 8 of its warp's 16.
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
        if (key + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2 >= limit[i / 2 % 2]) score[i] = -INFINITY_F;
}

// score = queries keysᵀ, under way until a wait
__device__ __forceinline__ void multiply(bf16 *queries, bf16 *keys, float (&score)[KEYS / 2]) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HEAD; k += 16) {
        bf16 *left = queries + k / 64 * ROWS * 64 + k % 64, *right = keys + k / 64 * KEYS * 64 + k % 64;
        wgmma<KEYS>(score, smem_desc(left), smem_desc(right), k > 0);
    }
    wgmma_commit();
}

// sum += weights values, under way until a wait
__device__ __forceinline__ void accumulate(
    const uint32_t (&weights)[KEYS / 16][4], bf16 *values, float (&sum)[HEAD / 2]) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++)
        wgmma<HEAD, true>(sum, weights[k], smem_desc_mn(values + k * 16 * 64, KEYS * 128));
    wgmma_commit();
}

template <int N> __device__ __forceinline__ void pack(const float (&values)[N], uint32_t (&pairs)[N / 8][4]) {
#pragma unroll
    for (int i = 0; i < N; i += 2) pairs[i / 8][i % 8 / 2] = pack_bf16(values[i], values[i + 1]);
}

template <int N> __device__ __forceinline__ void rescale(float (&values)[N], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < N; i++) values[i] *= factor[i / 2 % 2];
}

// The warpgroup's 64 rows to memory by way of the place of its queries; TMA leaves out rows that do not exist.
__device__ __forceinline__ void store(
    const float (&sum)[HEAD / 2], bf16 *tile, const CUtensorMap *map, const Work &work, int t, int consumer) {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    uint32_t pairs[HEAD / 16][4];
    pack(sum, pairs);
#pragma unroll
    for (int c = 0; c < HEAD / 8; c += 2) {
        int at = c + lane / 16;
        stmatrix_x4<false>(tile + at / 8 * ROWS * 64 + row * 64 + (at % 8 ^ row % 8) * 8, pairs[c / 2]);
    }
    fence_proxy_async();
    named_barrier_sync(STORE + consumer, 128);
    if (threadIdx.x % 128 == 0) {
        for (int half = 0; half < HALVES; half++)
            tma_store_4d(map, tile + half * ROWS * 64, half * 64, t, work.h, work.b);
        tma_store_commit();
        tma_store_wait_read<0>();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_forward(
    Problem p, const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
    const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap o, float *lse) {
    DYNAMIC_SMEM(bf16, queries);
    bf16 *keys = queries + QUERIES * HEAD, *values = keys + STAGES * KEYS * HEAD;
    __shared__ Ring key_ring, value_ring;
    __shared__ uint64_t queries_here;
    const Work work = work_of(p, (p.queries + QUERIES - 1) / QUERIES, true);
    const int first = work.tile * QUERIES, length = p.length(work.b);
    const int tiles = (p.limit(min(first + QUERIES, p.queries) - 1, length) + KEYS - 1) / KEYS;
    if (threadIdx.x == 0) {
        key_ring.init();
        value_ring.init();
        mbar_init(&queries_here, 1);
        mbar_fence_init();
    }
    __syncthreads();

    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // shuffled: wgmma wants branches known to be uniform
    if (warpgroup == 0) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x > 0 || tiles == 0) return;
        mbar_expect_tx(&queries_here, QUERIES * HEAD * 2);
        for (int i = 0; i < CONSUMERS * HALVES; i++)
            tma_load_4d(
                queries + i * ROWS * 64, &q, &queries_here, i % HALVES * 64, first + i / HALVES * ROWS, work.h, work.b);
        load_stage(key_ring, 0, &k, work, keys);
        for (int tile = 1; tile < tiles; tile++) {
            load_stage(key_ring, tile, &k, work, keys);
            load_stage(value_ring, tile - 1, &v, work, values);
        }
        load_stage(value_ring, tiles - 1, &v, work, values);
        return;
    }

    setmaxnreg_inc<CONSUMER_REGISTERS>();
    const int consumer = warpgroup - 1;
    const int t = first + consumer * ROWS + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;  // and t + 8
    // all queries of the warpgroup see the keys before this one
    const int all = p.limit(first + consumer * ROWS, length);
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
        if (consumer == 1) named_barrier_arrive(TURN, 256);  // the first begins
        mbar_wait(&queries_here, 0);
        key_ring.wait_full(0);
        wait_turn();
        multiply(own, keys, score);
        pass_turn(0);
        wgmma_wait<0>();
        key_ring.release(0);
        weigh(0);
        pack(score, weights);
        for (int tile = 1; tile < tiles; tile++) {
            key_ring.wait_full(tile);
            wait_turn();
            multiply(own, keys + tile % STAGES * KEYS * HEAD, score);
            value_ring.wait_full(tile - 1);
            accumulate(weights, values + (tile - 1) % STAGES * KEYS * HEAD, sum);
            pass_turn(tile);
            wgmma_wait<1>();
            key_ring.release(tile);
            weigh(tile);
            wgmma_wait<0>();
            value_ring.release(tile - 1);
            rescale(sum, change);
            pack(score, weights);
        }
        value_ring.wait_full(tiles - 1);
        accumulate(weights, values + (tiles - 1) % STAGES * KEYS * HEAD, sum);
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
    store(sum, own, &o, work, first + consumer * ROWS, consumer);
}
