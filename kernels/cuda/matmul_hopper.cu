// The matrix product of bfloat16 on Hopper (sm_90a): TMA brings the operands, wgmma multiplies, TMA takes the result.
//
// A block stays on its multiprocessor and goes from tile to tile of TILE_M x TILE_N. Of its three warpgroups the first
// only starts loads: a ring of STAGES steps of k, each with a barrier "full" and a barrier "empty". The other two sum
// 64 rows of the tile each, in registers that the first has given up. An operand lies in shared memory as it lies in
// global memory: wgmma reads either with k contiguous or with the other dim contiguous.
//
// A finished tile leaves in chunks of 128 bytes a row through BUFFERS buffers a warpgroup, while the loads of the next
// tile are under way. What the epilogue READS is brought into the same buffers while the tile is summed.
#include "matmul.cuh"

static_assert(TILE_M == 128, "64 rows for each of two warpgroups");
constexpr int TILE_K = 64, THREADS = 384, GROUP = 128;
constexpr int MMA_K = 16, ROWS = 64;   // of a warpgroup
constexpr int BOX = 64;                // elements of the 128 bytes that TMA's swizzle spans
constexpr int CHUNK_BYTES = ROWS * 128;
constexpr int WIDTH = 128 / sizeof(RESULT), CHUNKS = TILE_N / WIDTH;
constexpr int OUTPUTS = KEEPS ? 2 : 1;  // chunks written for each that is summed
static_assert(!READS || BUFFERS >= CHUNKS, "all that the epilogue reads is on its way at once");
static_assert(BUFFERS % OUTPUTS == 0, "both outputs of a chunk are written together");
static_assert(EPILOGUE == STORE || sizeof(RESULT) == sizeof(bf16), "what an epilogue reads or keeps is bfloat16");

// One operand: element (i, k) with i a row of a or a column of b. Where k is not contiguous its tile is boxes of 64 i.
template <int SIZE, bool ALONG_K> struct Operand {
    static constexpr int BYTES = SIZE * TILE_K * sizeof(bf16);
    static constexpr int BOX_BYTES = BOX * TILE_K * sizeof(bf16);

    __device__ __forceinline__ static void load(unsigned char *tile, const CUtensorMap *map, uint64_t *full, int i,
                                                int k) {
        if constexpr (ALONG_K) {
            tma_load_2d(tile, map, full, k, i);
        } else {
#pragma unroll
            for (int box = 0; box < SIZE / BOX; box++)
                tma_load_2d(tile + box * BOX_BYTES, map, full, i + box * BOX, k);
        }
    }

    // for wgmma: from element (i, k) of the tile, i a multiple of 64
    __device__ __forceinline__ static uint64_t descriptor(const unsigned char *tile, int i, int k) {
        if constexpr (ALONG_K) return smem_desc(tile + (i * TILE_K + k) * sizeof(bf16));
        return smem_desc_mn(tile + i / BOX * BOX_BYTES + k * BOX * sizeof(bf16), BOX_BYTES);
    }
};

using A = Operand<TILE_M, A_ALONG_K>;
using B = Operand<TILE_N, B_ALONG_K>;
constexpr int STAGE_BYTES = A::BYTES + B::BYTES;

// A stage of the ring; the phase is the parity of its round.
struct Turn {
    int stage = 0, phase = 0;

    __device__ __forceinline__ void next() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// The block's shared memory; sizes as mlm_mpi/backend/cuda/matmul.py counts them.
struct Shared {
    unsigned char operands[STAGES][STAGE_BYTES];
    unsigned char chunks[2][BUFFERS][CHUNK_BYTES];
    __align__(16) bf16 bias[2][TILE_N];
    uint64_t full[STAGES], empty[STAGES], read[2];

    __device__ __forceinline__ void init() {
        for (int stage = 0; stage < STAGES; stage++) {
            mbar_init(&full[stage], 1);
            mbar_init(&empty[stage], 2);
        }
        mbar_init(&read[0], 1);
        mbar_init(&read[1], 1);
        mbar_fence_init();
    }
};

// One of the two warpgroups that multiply.
struct Consumer {
    Shared &shared;
    int number, thread;  // of the warpgroup; of the thread in it

    __device__ __forceinline__ void together() const { named_barrier_sync(1 + number, GROUP); }

    // Before the tile is summed: what the epilogue will want.
    __device__ __forceinline__ void prepare(const CUtensorMap *other, const bf16 *bias, int n, int2 origin) const {
        if constexpr (BIASED) {
            for (int i = thread; i < TILE_N; i += GROUP)
                shared.bias[number][i] = bias && origin.y + i < n ? bias[origin.y + i] : bf16{0};
        }
        if (READS && thread == 0) {
            tma_store_wait_read<0>();
            mbar_expect_tx(&shared.read[number], CHUNKS * CHUNK_BYTES);
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                int x = origin.y + chunk * WIDTH;
                tma_load_2d(shared.chunks[number][chunk], other, &shared.read[number], x, origin.x);
            }
        }
    }

    __device__ __forceinline__ void sum(float *d, Turn &turn, int steps) const {
        int before = 0;
        for (int step = 0; step < steps; step++) {
            mbar_wait(&shared.full[turn.stage], turn.phase);
            const unsigned char *a = shared.operands[turn.stage], *b = a + A::BYTES;
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < TILE_K; k += MMA_K)
                wgmma<TILE_N, !A_ALONG_K, !B_ALONG_K>(d, A::descriptor(a, number * ROWS, k), B::descriptor(b, 0, k),
                                                      step > 0 || k > 0);
            wgmma_commit();
            wgmma_wait<1>();  // the step before has been read
            if (step > 0 && thread == 0) mbar_arrive(&shared.empty[before]);
            before = turn.stage;
            turn.next();
        }
        wgmma_wait<0>();
        if (thread == 0) mbar_arrive(&shared.empty[before]);
    }

    // Where two neighbours lie that a thread has in a chunk, of the eight columns `unit`; the swizzle is TMA's. As
    // wgmma leaves the sums, another two lie eight rows below.
    template <class T> __device__ __forceinline__ uint32_t *pair_at(unsigned char *chunk, int unit) const {
        int row = thread / 32 * 16 + thread % 32 / 4, byte = (unit * 8 + thread % 4 * 2) * sizeof(T);
        return reinterpret_cast<uint32_t *>(chunk + row * 128 + (byte ^ row % 8 * 16));
    }

    __device__ __forceinline__ static void put(uint32_t *to, const Floats<2> &x) {
        if constexpr (sizeof(RESULT) == sizeof(float))
            *reinterpret_cast<Floats<2> *>(to) = x;
        else
            *to = pack_bf16(x.at[0], x.at[1]);
    }

    // The sums of a chunk, finished, into its place in shared memory; all is read before anything is written.
    __device__ __forceinline__ void finish_chunk(const float *d, unsigned char *place, const bf16 *bias) const {
        constexpr int UNITS = WIDTH / 8, BELOW = 8 * 128 / sizeof(uint32_t);
        uint32_t added[UNITS] = {}, other[UNITS][2] = {};  // pairs of bfloat16
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            if constexpr (BIASED) added[unit] = *reinterpret_cast<const uint32_t *>(bias + unit * 8 + thread % 4 * 2);
            if constexpr (READS) {
                other[unit][0] = pair_at<bf16>(place, unit)[0];
                other[unit][1] = pair_at<bf16>(place, unit)[BELOW];
            }
        }
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float *sum = d + unit * 4 + half * 2;
                uint32_t b = added[unit], x = other[unit][half];
                Floats<2> y = {sum[0], sum[1]};
                if constexpr (EPILOGUE != STORE)
                    y = {finished(sum[0], low_half(b), low_half(x)), finished(sum[1], high_half(b), high_half(x))};
                put(pair_at<RESULT>(place, unit) + half * BELOW, y);
                if constexpr (KEEPS) put(pair_at<RESULT>(place + CHUNK_BYTES, unit) + half * BELOW, activated(y));
            }
    }

    __device__ __forceinline__ void store(const unsigned char *place, const CUtensorMap *out, const CUtensorMap *pre,
                                          int x, int y, int accumulate) const {
        if constexpr (KEEPS) tma_store_2d(pre, place, x, y);
        if (EPILOGUE == STORE && sizeof(RESULT) == sizeof(float) && accumulate)
            tma_add_2d(out, place, x, y);
        else
            tma_store_2d(out, place + (OUTPUTS - 1) * CHUNK_BYTES, x, y);
        tma_store_commit();
    }

    __device__ __forceinline__ void finish(const float *d, const CUtensorMap *out, const CUtensorMap *pre, int2 origin,
                                           int accumulate, int round) const {
        if constexpr (READS) mbar_wait(&shared.read[number], round % 2);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            unsigned char *place = shared.chunks[number][chunk * OUTPUTS % BUFFERS];
            if (!READS && thread == 0) tma_store_wait_read<BUFFERS / OUTPUTS - 1>();
            together();
            finish_chunk(d + chunk * WIDTH / 2, place, shared.bias[number] + chunk * WIDTH);
            fence_proxy_async();
            together();
            if (thread == 0) store(place, out, pre, origin.y + chunk * WIDTH, origin.x, accumulate);
        }
    }
};

// Maps: a, b by boxes of operands; out, other by chunks. `other`: what RESIDUAL and SLOPE read, or what GELU and RELU2 keep.
extern "C" __global__ void __launch_bounds__(THREADS, 1) matmul_hopper(
    const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
    const __grid_constant__ CUtensorMap out, const __grid_constant__ CUtensorMap other, const bf16 *bias, int m, int n,
    int k, int accumulate, int count) {
    DYNAMIC_SMEM(unsigned char, memory);
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    int tiles_m = tiles_of(m, TILE_M), tiles_n = tiles_of(n, TILE_N);
    Shares shares{tiles_m * tiles_n, tiles_of(k, TILE_K), count};
    if (threadIdx.x == 0) shared.init();
    __syncthreads();

    if (threadIdx.x < GROUP) {
        setmaxnreg_dec<40>();
        if (threadIdx.x > 0) return;
        Turn turn;
        shares.over_pieces([&](const Piece &piece) {
            int2 tile = place(piece.tile, tiles_m, tiles_n);
            for (int step = piece.first; step < piece.last; step++, turn.next()) {
                uint64_t *full = &shared.full[turn.stage];
                unsigned char *to = shared.operands[turn.stage];
                mbar_wait(&shared.empty[turn.stage], turn.phase ^ 1);
                mbar_expect_tx(full, STAGE_BYTES);
                A::load(to, &a, full, tile.x * TILE_M, step * TILE_K);
                B::load(to + A::BYTES, &b, full, tile.y * TILE_N, step * TILE_K);
            }
        });
    } else {
        setmaxnreg_inc<232>();
        Consumer consumer{shared, int(threadIdx.x) / GROUP - 1, int(threadIdx.x) % GROUP};
        Turn turn;
        int round = 0;
        float d[TILE_N / 2];
        shares.over_pieces([&](const Piece &piece) {
            int2 at = origin(piece, place(piece.tile, tiles_m, tiles_n));
            at.x += consumer.number * ROWS;
            consumer.prepare(&other, bias, n, at);
            consumer.sum(d, turn, piece.last - piece.first);
            consumer.finish(d, &out, &other, at, accumulate, round++);
        });
        if (consumer.thread == 0) tma_store_wait_read<0>();
    }
}
