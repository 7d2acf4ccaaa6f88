// The matrix product of bfloat16 on tensor cores by mma.sync: sm_80 and later.
//
// Four warps sum a TILE_M x TILE_N tile, a quarter each. The operands' tiles of STAGES - 1 steps of k are on their way
// from global memory (cp.async) while one is multiplied. They lie in shared memory as they lie in global memory;
// ldmatrix transposes those whose k is not contiguous. 16-byte units are permuted within a tile so that neither the
// copies nor ldmatrix meet a bank twice.
#include "matmul.cuh"

constexpr int TILE_K = 32, STAGES = 4, THREADS = 128, WARPS_N = 2;
constexpr int UNIT = 8;                                       // elements of 16 bytes
constexpr int PART_M = TILE_M / 2, PART_N = TILE_N / WARPS_N;  // of a warp
constexpr int MMA_M = 16, MMA_N = 8, MMA_K = 16;

// One operand: element (i, k) with i a row of a or a column of b.
template <int SIZE, bool ALONG_K> struct Operand {
    static constexpr int BYTES = SIZE * TILE_K * sizeof(bf16);
    static constexpr int ROW = (ALONG_K ? TILE_K : SIZE) / UNIT;  // units of a row in shared memory
    static constexpr int ROUNDS = SIZE * TILE_K / UNIT / THREADS;  // in which the block copies a tile

    const bf16 *from;
    int pitch, extent, depth;  // extent of i, depth of k: units are whole inside and outside of both

    // Where unit `along` of row `across` lies. Eight rows of ldmatrix at one `along` fill all banks once: rows of
    // 64 bytes lie two to a bank line, so pairs of them are told apart; longer rows all start at the same bank.
    __device__ __forceinline__ static int place_of(int across, int along) {
        return (across * ROW + (along ^ (ROW == 4 ? across / 2 % 4 : across % 8))) * UNIT;
    }

    __device__ __forceinline__ void load(bf16 *tile, int first_i, int first_k) const {
        const bf16 *start = from + (ALONG_K ? int64_t(first_i) * pitch + first_k : int64_t(first_k) * pitch + first_i);
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            int unit = round * THREADS + threadIdx.x, across = unit / ROW, along = unit % ROW;
            int i = first_i + (ALONG_K ? across : along * UNIT), k = first_k + (ALONG_K ? along * UNIT : across);
            bool inside = i < extent && k < depth;
            cp_async16(tile + place_of(across, along), inside ? start + across * pitch + along * UNIT : from, inside);
        }
    }

    // 16 of i from `i` on by 16 of k, as the four 8x8 matrices of mma: i before k where I_FIRST (operand a), else k
    // before i (two of operand b, side by side).
    template <bool I_FIRST>
    __device__ __forceinline__ static void read(uint32_t *fragment, const bf16 *tile, int i, int k) {
        int lane = threadIdx.x % 32, row = lane % 8, low = lane / 8 % 2, high = lane / 16;
        i += 8 * (I_FIRST ? low : high);
        k += 8 * (I_FIRST ? high : low);
        if constexpr (ALONG_K)
            ldmatrix_x4<false>(fragment, tile + place_of(i + row, k / UNIT));
        else
            ldmatrix_x4<true>(fragment, tile + place_of(k + row, i / UNIT));
    }
};

using A = Operand<TILE_M, A_ALONG_K>;
using B = Operand<TILE_N, B_ALONG_K>;
constexpr int STAGE_BYTES = A::BYTES + B::BYTES;

// A warp's sums, as mma leaves them: a thread has two neighbours in each of two rows, eight apart.
struct Sums {
    static constexpr int ROWS = PART_M / MMA_M, COLUMNS = PART_N / MMA_N;
    static constexpr int PITCH = TILE_N + 8;  // of the sums in shared memory: four rows of pairs meet 32 banks
    float at[ROWS][COLUMNS][4] = {};

    __device__ __forceinline__ static int row() { return threadIdx.x / 32 / WARPS_N * PART_M; }
    __device__ __forceinline__ static int column() { return threadIdx.x / 32 % WARPS_N * PART_N; }

    __device__ __forceinline__ void add(const bf16 *a, const bf16 *b) {
#pragma unroll
        for (int k = 0; k < TILE_K; k += MMA_K) {
            uint32_t x[ROWS][4], y[COLUMNS / 2][4];
#pragma unroll
            for (int i = 0; i < ROWS; i++) A::read<true>(x[i], a, row() + i * MMA_M, k);
#pragma unroll
            for (int j = 0; j < COLUMNS / 2; j++) B::read<false>(y[j], b, column() + j * 2 * MMA_N, k);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) mma_m16n8k16(at[i][j], x[i], y[j / 2] + j % 2 * 2);
        }
    }

    // into shared memory, so that rows can be written in whole 16-byte runs
    __device__ __forceinline__ void put(float *tile) const {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int r = row() + i * MMA_M + half * 8 + lane / 4, c = column() + j * MMA_N + lane % 4 * 2;
                    Floats<2> pair = {{at[i][j][2 * half], at[i][j][2 * half + 1]}};
                    *reinterpret_cast<Floats<2> *>(tile + r * PITCH + c) = pair;
                }
    }
};

__device__ __forceinline__ void finish(const Result &result, int2 origin, const float *sums) {
    constexpr int RUNS = TILE_N / UNIT, BATCH = 4, ROWS = THREADS / RUNS;  // the block finishes ROWS rows at a time
    int row = threadIdx.x / RUNS, column = threadIdx.x % RUNS * UNIT;
    for (; row < TILE_M; row += BATCH * ROWS)
        result.finish<UNIT, BATCH>(
            [&](int i) { return make_int2(origin.x + row + i * ROWS, origin.y + column); },
            [&](int i) {
                return *reinterpret_cast<const Floats<UNIT> *>(sums + (row + i * ROWS) * Sums::PITCH + column);
            });
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) matmul_bf16(
    const bf16 *a, const bf16 *b, int m, int n, int k, int pitch_a, int pitch_b, RESULT *out, int rows, int columns,
    int pitch, int accumulate, const bf16 *bias, const bf16 *other, bf16 *pre, int count) {
    DYNAMIC_SMEM(unsigned char, shared);
    A from_a{a, pitch_a, m, k};
    B from_b{b, pitch_b, n, k};
    Result result{out, bias, other, pre, pitch, rows, columns, accumulate};
    int tiles_m = tiles_of(m, TILE_M), tiles_n = tiles_of(n, TILE_N);
    auto tile_a = [&](int step) { return reinterpret_cast<bf16 *>(shared + step % STAGES * STAGE_BYTES); };
    auto tile_b = [&](int step) { return reinterpret_cast<bf16 *>(shared + step % STAGES * STAGE_BYTES + A::BYTES); };

    Shares{tiles_m * tiles_n, tiles_of(k, TILE_K), count}.over_pieces([&](const Piece &piece) {
        int2 tile = place(piece.tile, tiles_m, tiles_n);
        auto load = [&](int step) {
            if (step < piece.last) {
                from_a.load(tile_a(step), tile.x * TILE_M, step * TILE_K);
                from_b.load(tile_b(step), tile.y * TILE_N, step * TILE_K);
            }
            cp_async_commit();  // an empty group too: the wait below counts groups
        };
        for (int ahead = 0; ahead < STAGES - 1; ahead++) load(piece.first + ahead);
        Sums sums;
        for (int step = piece.first; step < piece.last; step++) {
            cp_async_wait<STAGES - 2>();
            __syncthreads();  // this step has come for all threads, and all have read the one whose place is next
            load(step + STAGES - 1);
            sums.add(tile_a(step), tile_b(step));
        }
        __syncthreads();
        sums.put(reinterpret_cast<float *>(shared));
        __syncthreads();
        finish(result, origin(piece, tile), reinterpret_cast<float *>(shared));
        __syncthreads();
    });
}
