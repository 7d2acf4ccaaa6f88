// What every matrix product here shares: how the work is dealt to blocks, and what is done with a finished sum.
//
// out = epilogue(a b) for a (m, k), b (k, n). Each operand lies with k contiguous or with its other dim contiguous
// (A_ALONG_K, B_ALONG_K), so that x w, dy w^T and x^T dy are read where they are.
#pragma once
#include "common.cuh"
#include "gelu.cuh"

enum Epilogue {
    STORE,     // out = sum, or out += sum
    BIAS,      // out = sum + bias
    RESIDUAL,  // out = residual + (sum + bias)
    GELU,      // pre = sum + bias, out = gelu(pre)
    SLOPE,     // out = sum gelu'(pre)
};

constexpr bool BIASED = EPILOGUE == BIAS || EPILOGUE == RESIDUAL || EPILOGUE == GELU;

// ---- which part of the sums a block computes

// A tile of the result, and the k steps [first, last) that one block sums for it.
struct Piece {
    int tile, first, last;
    int slot;  // where the sums are kept until those of the tile's other pieces are there; -1: there are none
};

// All steps of all tiles, tile after tile, cut into equal shares: one share a tile, or (few tiles, long k) one share a
// block, whatever tiles it touches. What is summed in pieces is kept in float32 and added by matmul_pieces.cu in the order
// of k: the sum depends on the number of shares only. Osama et al., "Stream-K", arXiv:2301.03598.
struct Shares {
    int tiles, steps, count;

    __device__ __forceinline__ bool cut_tiles() const { return count != tiles; }
    __device__ __forceinline__ int64_t begin(int share) const { return int64_t(tiles) * steps * share / count; }
    __device__ __forceinline__ int slot(int share, int tile) const { return share + tile; }  // of no other piece

    // the share that holds a step
    __device__ __forceinline__ int holder(int64_t step) const {
        return int(((step + 1) * count - 1) / (int64_t(tiles) * steps));
    }

    template <class F> __device__ __forceinline__ void over_pieces(F body) const {
        for (int share = blockIdx.x; share < count; share += gridDim.x) {
            int64_t at = begin(share), end = begin(share + 1);
            while (at < end) {
                int tile = int(at / steps), first = int(at - int64_t(tile) * steps);
                int last = int(min(int64_t(steps), first + (end - at)));
                body(Piece{tile, first, last, cut_tiles() ? slot(share, tile) : -1});
                at += last - first;
            }
        }
    }
};

// Tiles go down a band of rows before they go right, so that the blocks running at one time read a near-square part of
// the result's rows and columns, and find most of it in L2.
constexpr int BAND = 16;

__device__ __forceinline__ int2 place(int tile, int tiles_m, int tiles_n) {
    int band = tile / (BAND * tiles_n), at = tile % (BAND * tiles_n);
    int rows = min(BAND, tiles_m - band * BAND);
    return make_int2(band * BAND + at % rows, at / rows);
}

// Where a piece's sums go in `out`: its tile's place in the result, or its slot's in a column of tiles.
__device__ __forceinline__ int2 origin(const Piece &piece, int2 tile) {
    return piece.slot < 0 ? make_int2(tile.x * TILE_M, tile.y * TILE_N) : make_int2(piece.slot * TILE_M, 0);
}

__device__ __forceinline__ int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

// ---- what becomes of a sum

// `other`: the residual, the input of the GELU, or what is in `out` already.
__device__ __forceinline__ float finished(float sum, float bias, float other) {
    if constexpr (EPILOGUE == SLOPE) return sum * slope(other);
    return other + (sum + bias);
}

__device__ __forceinline__ float gelu(float pre) { return pre * gate(pre); }

// COUNT neighbours of a row, moved at once where addresses are multiples of its size (VECTOR)
template <class T, int COUNT> struct __align__(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Run {
    T at[COUNT];
};

template <int COUNT> using Floats = Run<float, COUNT>;

// Zero past the end of a row, `valid` elements away.
template <int COUNT, class T> __device__ __forceinline__ Floats<COUNT> read_run(const T *from, int valid) {
    Floats<COUNT> x;
    if (VECTOR && valid >= COUNT) {
        Run<T, COUNT> run = *reinterpret_cast<const Run<T, COUNT> *>(from);
#pragma unroll
        for (int i = 0; i < COUNT; i++) x.at[i] = to_float(run.at[i]);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) x.at[i] = i < valid ? to_float(from[i]) : 0.0f;
    }
    return x;
}

template <int COUNT, class T> __device__ __forceinline__ void write_run(T *to, int valid, const Floats<COUNT> &x) {
    if (VECTOR && valid >= COUNT) {
        Run<T, COUNT> run;
#pragma unroll
        for (int i = 0; i < COUNT; i++) run.at[i] = from_float<T>(x.at[i]);
        *reinterpret_cast<Run<T, COUNT> *>(to) = run;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (i < valid) to[i] = from_float<T>(x.at[i]);
    }
}

// The result and all that goes into it besides the sums; rows of every matrix are `pitch` elements apart.
struct Result {
    RESULT *out;
    const ELEMENT *bias;
    const ELEMENT *other;  // the residual (RESIDUAL) or the input of the GELU (SLOPE)
    ELEMENT *pre;          // written by GELU
    int pitch, rows, columns, accumulate;

    // out[row][column ...] from its sums
    template <int COUNT> __device__ __forceinline__ void finish(int row, int column, const Floats<COUNT> &sum) const {
        int valid = min(COUNT, columns - column);
        if (row >= rows || valid <= 0) return;
        int64_t at = int64_t(row) * pitch + column;
        Floats<COUNT> added = {}, old = {}, y;
        if constexpr (BIASED) added = read_run<COUNT>(bias + column, valid);
        if constexpr (EPILOGUE == RESIDUAL || EPILOGUE == SLOPE) old = read_run<COUNT>(other + at, valid);
        if (EPILOGUE == STORE && accumulate) old = read_run<COUNT>(out + at, valid);
#pragma unroll
        for (int i = 0; i < COUNT; i++) y.at[i] = finished(sum.at[i], added.at[i], old.at[i]);
        if constexpr (EPILOGUE == GELU) {
            write_run(pre + at, valid, y);
#pragma unroll
            for (int i = 0; i < COUNT; i++) y.at[i] = gelu(to_float(from_float<ELEMENT>(y.at[i])));  // of what is kept
        }
        write_run(out + at, valid, y);
    }
};
