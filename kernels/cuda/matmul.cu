// The matrix product for any operands: float32 or bfloat16, any size, any address. FMA on CUDA cores.
//
// A block sums a TILE_M x TILE_N tile, TILE_K steps of k at a time. Both operands' tiles lie in shared memory as
// [k][element], in float32, so that a thread reads its rows and columns of one k as 16-byte runs. The next tiles travel
// through registers while this one is summed: what has to be turned, converted or cut off at an edge is, on the way.
#include "matmul.cuh"

constexpr int TILE_K = 8, THREADS = 128;
constexpr int RUN = 4;                                        // elements a thread moves or reads at once
constexpr int LANES_M = 8, LANES_N = 4;                       // a warp's threads over its part of the tile
constexpr int WARPS_M = 2, WARPS_N = 2;                       // the block's warps over the tile
constexpr int PART_M = TILE_M / WARPS_M, PART_N = TILE_N / WARPS_N;
constexpr int RUNS_M = PART_M / (RUN * LANES_M), RUNS_N = PART_N / (RUN * LANES_N);  // runs a thread has in each
constexpr int PAD = 4;

// One operand: element (i, k) with i a row of a or a column of b.
template <int SIZE, bool ALONG_K> struct Operand {
    static constexpr int PITCH = SIZE + PAD;  // of the tile in shared memory
    static constexpr int RUNS = SIZE * TILE_K / RUN / THREADS;
    static_assert(RUNS * RUN * THREADS == SIZE * TILE_K, "a tile is moved by all threads alike");

    const ELEMENT *from;
    int pitch, extent, depth;  // extent of i, depth of k
    Floats<RUN> held[RUNS];

    // where the runs of a tile start: (i, k)
    __device__ __forceinline__ static int2 start(int run) {
        int number = run * THREADS + threadIdx.x;
        constexpr int ROW = (ALONG_K ? TILE_K : SIZE) / RUN;
        int along = number % ROW * RUN, across = number / ROW;
        return ALONG_K ? make_int2(across, along) : make_int2(along, across);
    }

    __device__ __forceinline__ void fetch(int first_i, int first_k) {
        int64_t start_of_tile = ALONG_K ? int64_t(first_i) * pitch + first_k : int64_t(first_k) * pitch + first_i;
        const ELEMENT *tile = from + start_of_tile;
#pragma unroll
        for (int run = 0; run < RUNS; run++) {
            int2 at = start(run);
            int rows = extent - first_i - at.x, steps = depth - first_k - at.y;  // to the edge
            int valid = min(rows, steps) > 0 ? (ALONG_K ? steps : rows) : 0;
            held[run] = read_run<RUN>(tile + (ALONG_K ? at.x * pitch + at.y : at.y * pitch + at.x), valid);
        }
    }

    __device__ __forceinline__ void put(float *tile) const {
#pragma unroll
        for (int run = 0; run < RUNS; run++) {
            int2 at = start(run);
            float *to = tile + at.y * PITCH + at.x;
            if constexpr (ALONG_K) {
#pragma unroll
                for (int e = 0; e < RUN; e++) to[e * PITCH] = held[run].at[e];
            } else {
                *reinterpret_cast<Floats<RUN> *>(to) = held[run];
            }
        }
    }
};

using A = Operand<TILE_M, A_ALONG_K>;
using B = Operand<TILE_N, B_ALONG_K>;

// A thread's sums: runs of neighbouring rows by runs of neighbouring columns.
struct Sums {
    int row, column;  // of the first run
    Floats<RUN> at[RUNS_M * RUN][RUNS_N] = {};

    __device__ __forceinline__ Sums() {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        row = warp / WARPS_N * PART_M + lane / LANES_N * RUN;
        column = warp % WARPS_N * PART_N + lane % LANES_N * RUN;
    }

    __device__ __forceinline__ void add(const float *a, const float *b) {
#pragma unroll
        for (int k = 0; k < TILE_K; k++) {
            Floats<RUN> x[RUNS_M], y[RUNS_N];
#pragma unroll
            for (int i = 0; i < RUNS_M; i++)
                x[i] = *reinterpret_cast<const Floats<RUN> *>(a + k * A::PITCH + row + i * RUN * LANES_M);
#pragma unroll
            for (int j = 0; j < RUNS_N; j++)
                y[j] = *reinterpret_cast<const Floats<RUN> *>(b + k * B::PITCH + column + j * RUN * LANES_N);
#pragma unroll
            for (int i = 0; i < RUNS_M * RUN; i++)
#pragma unroll
                for (int j = 0; j < RUNS_N * RUN; j++)
                    at[i][j / RUN].at[j % RUN] += x[i / RUN].at[i % RUN] * y[j / RUN].at[j % RUN];
        }
    }

    __device__ __forceinline__ void finish(const Result &result, int2 origin) const {
        constexpr int ROWS = 2;  // at a time: with four the scalar builds for sm_80 spill
#pragma unroll
        for (int i = 0; i < RUNS_M * RUN; i += ROWS) {
            int2 first = make_int2(origin.x + row + i / RUN * RUN * LANES_M + i % RUN, origin.y + column);
            result.finish<RUN, ROWS * RUNS_N>(
                [&](int n) { return make_int2(first.x + n / RUNS_N, first.y + n % RUNS_N * RUN * LANES_N); },
                [&](int n) { return at[i + n / RUNS_N][n % RUNS_N]; });
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 3) matmul(
    const ELEMENT *a, const ELEMENT *b, int m, int n, int k, int pitch_a, int pitch_b, RESULT *out, int rows,
    int columns, int pitch, int accumulate, const ELEMENT *bias, const ELEMENT *other, ELEMENT *pre, int count) {
    __shared__ __align__(16) float tile_a[2][TILE_K * A::PITCH], tile_b[2][TILE_K * B::PITCH];
    A from_a{a, pitch_a, m, k};
    B from_b{b, pitch_b, n, k};
    Result result{out, bias, other, pre, pitch, rows, columns, accumulate};
    int tiles_m = tiles_of(m, TILE_M), tiles_n = tiles_of(n, TILE_N);

    Shares{tiles_m * tiles_n, tiles_of(k, TILE_K), count}.over_pieces([&](const Piece &piece) {
        int2 tile = place(piece.tile, tiles_m, tiles_n);
        auto fetch = [&](int step) {
            from_a.fetch(tile.x * TILE_M, step * TILE_K);
            from_b.fetch(tile.y * TILE_N, step * TILE_K);
        };
        auto put = [&](int step) {
            from_a.put(tile_a[step % 2]);
            from_b.put(tile_b[step % 2]);
        };
        Sums sums;
        fetch(piece.first);
        put(piece.first);
        __syncthreads();
        for (int step = piece.first; step < piece.last; step++) {
            bool more = step + 1 < piece.last;
            if (more) fetch(step + 1);
            sums.add(tile_a[step % 2], tile_b[step % 2]);
            if (more) put(step + 1);
            __syncthreads();
        }
        sums.finish(result, origin(piece, tile));
    });
}
