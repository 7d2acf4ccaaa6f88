// The second half of a product whose tiles were summed in pieces (matmul.cuh): the pieces of a tile, added in the order
// of k, and the epilogue. Memory-bound: reads every partial sum once.
#include "matmul.cuh"

constexpr int THREADS = 256, COUNT = 4;

// blockIdx.x: tile; blockIdx.y: which THREADS * COUNT elements of it
extern "C" __global__ void __launch_bounds__(THREADS) matmul_pieces(
    const float *partial, int m, int n, int steps, int count, RESULT *out, int pitch, int accumulate,
    const ELEMENT *bias, const ELEMENT *other, ELEMENT *pre) {
    int tiles_m = tiles_of(m, TILE_M), tiles_n = tiles_of(n, TILE_N), tile = blockIdx.x;
    Shares shares{tiles_m * tiles_n, steps, count};
    int first = shares.holder(tile * steps), last = shares.holder((tile + 1) * steps - 1);
    int element = (blockIdx.y * THREADS + threadIdx.x) * COUNT;

    Floats<COUNT> sum = {};
    for (int share = first; share <= last; share++) {
        const float *from = partial + int64_t(shares.slot(share, tile)) * TILE_M * TILE_N + element;
        Floats<COUNT> piece = *reinterpret_cast<const Floats<COUNT> *>(from);
#pragma unroll
        for (int i = 0; i < COUNT; i++) sum.at[i] += piece.at[i];
    }
    int2 where = place(tile, tiles_m, tiles_n);
    Result result{out, bias, other, pre, pitch, m, n, accumulate};
    int2 at = make_int2(where.x * TILE_M + element / TILE_N, where.y * TILE_N + element % TILE_N);
    result.finish<COUNT, 1>([&](int) { return at; }, [&](int) { return sum; });
}
