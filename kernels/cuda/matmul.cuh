// What every matrix product here shares: how the work is dealt to blocks, and what is done with a finished sum.
//
// out = epilogue(a b) for a (m, k), b (k, n). Each operand lies with k contiguous or with its other dim contiguous
// (A_ALONG_K, B_ALONG_K), so that x w, dy w^T and x^T dy are read where they are.
#pragma once
#include "common.cuh"
#include "gelu.cuh"
#include "relu2.cuh"

enum Epilogue {
    STORE,     // out = sum, or out += sum
    BIAS,      // out = sum + bias
    RESIDUAL,  // out = residual + (sum + bias)
    GELU,      // pre = sum + bias, out = gelu(pre)
    RELU2,     // pre = sum, out = relu2(pre)
    SLOPE,     // out = sum gelu'(pre)
};

constexpr bool BIASED = EPILOGUE == BIAS || EPILOGUE == RESIDUAL || EPILOGUE == GELU;
constexpr bool KEEPS = EPILOGUE == GELU || EPILOGUE == RELU2;
constexpr bool READS = EPILOGUE == RESIDUAL || EPILOGUE == SLOPE;

// ---- which part of the sums a block computes

// A tile of the result, and the k steps [first, last) that one block sums for it.
struct Piece {
    int tile, first, last;
    int slot;  // where the sums are kept until those of the tile's other pieces are there; -1: there are none
};

// All steps of all tiles, tile after tile, cut into equal shares: one share a tile, or (few tiles, long k) one share a
// block, whatever tiles it touches. What is summed in pieces is kept in float32 and added by matmul_pieces.cu in the
// order of k: the sum depends on the number of shares only. Osama et al., "Stream-K", arXiv:2301.03598.
struct Shares {
    int tiles, steps, count;

    __device__ __forceinline__ bool cut_tiles() const { return count != tiles; }
    __device__ __forceinline__ int slot(int share, int tile) const { return share + tile; }  // of no other piece

    // of shares that cut tiles: `plan` leaves no more than 2^31 steps to them, and the first few have one more
    __device__ __forceinline__ int each() const { return tiles * steps / count; }
    __device__ __forceinline__ int longer() const { return tiles * steps % count; }
    __device__ __forceinline__ int begin(int share) const { return share * each() + min(share, longer()); }

    // the share that holds a step
    __device__ __forceinline__ int holder(int step) const {
        int in_longer = longer() * (each() + 1);
        return step < in_longer ? step / (each() + 1) : longer() + (step - in_longer) / each();
    }

    template <class F> __device__ __forceinline__ void over_pieces(F body) const {
        for (int share = blockIdx.x; share < count; share += gridDim.x) {
            int tile = share, first = 0, left = steps;
            if (cut_tiles()) {
                int at = begin(share);
                left = begin(share + 1) - at;
                tile = at / steps;
                first = at % steps;
            }
            while (left > 0) {
                int last = min(steps, first + left);
                body(Piece{tile, first, last, cut_tiles() ? slot(share, tile) : -1});
                left -= last - first;
                first = 0;
                tile++;
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

// `other`: the residual (RESIDUAL), the input of the GELU (SLOPE), or what STORE adds to.
__device__ __forceinline__ float finished(float sum, float bias, float other) {
    if constexpr (EPILOGUE == SLOPE) return sum * slope(other);
    if constexpr (EPILOGUE == RESIDUAL) return other + (sum + bias);
    if constexpr (EPILOGUE == STORE) return other + sum;
    return sum + bias;
}

__device__ __forceinline__ float low_half(uint32_t word) { return __int_as_float(word << 16); }
__device__ __forceinline__ float high_half(uint32_t word) { return __int_as_float(word & 0xffff0000); }

// COUNT elements at a multiple of 16 bytes, or of 8 for four bfloat16
template <int COUNT> __device__ __forceinline__ Pack<float, COUNT> load_global(const float *from) {
    Pack<float, COUNT> x;
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        uint4 words = *reinterpret_cast<const uint4 *>(from + i);
        x.at[i] = __int_as_float(words.x), x.at[i + 1] = __int_as_float(words.y);
        x.at[i + 2] = __int_as_float(words.z), x.at[i + 3] = __int_as_float(words.w);
    }
    return x;
}
template <int COUNT> __device__ __forceinline__ Pack<float, COUNT> load_global(const bf16 *from) {
    if constexpr (COUNT == 4) {
        uint2 words = *reinterpret_cast<const uint2 *>(from);
        return {low_half(words.x), high_half(words.x), low_half(words.y), high_half(words.y)};
    } else {
        static_assert(COUNT == 8, "16 bytes");
        uint4 words = *reinterpret_cast<const uint4 *>(from);
        return {low_half(words.x), high_half(words.x), low_half(words.y), high_half(words.y),
                low_half(words.z), high_half(words.z), low_half(words.w), high_half(words.w)};
    }
}

template <int COUNT> using Floats = Pack<float, COUNT>;  // neighbours of a row

// Zero past the end of a row, `valid` elements away. All at once where addresses are multiples of 16 bytes (VECTOR).
template <int COUNT, class T> __device__ __forceinline__ Floats<COUNT> read_run(const T *from, int valid) {
    if (VECTOR && valid >= COUNT) return load_global<COUNT>(from);
    Floats<COUNT> x;
#pragma unroll
    for (int i = 0; i < COUNT; i++) x.at[i] = i < valid ? to_float(from[i]) : 0.0f;
    return x;
}

template <int COUNT, class T> __device__ __forceinline__ void write_run(T *to, int valid, const Floats<COUNT> &x) {
    if (VECTOR && valid >= COUNT) return store(to, x);
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        if (i < valid) to[i] = from_float<T>(x.at[i]);
}

// GELU or squared ReLU, of the input as it is kept, so that backward finds the slope of the same number
template <int COUNT> __device__ __forceinline__ Floats<COUNT> activated(const Floats<COUNT> &pre) {
    Floats<COUNT> y;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        float kept = to_float(from_float<ELEMENT>(pre.at[i]));
        y.at[i] = EPILOGUE == GELU ? kept * gate(kept) : positive(kept) * positive(kept);
    }
    return y;
}

// The result and all that goes into it besides the sums; rows of every matrix are `pitch` elements apart.
struct Result {
    RESULT *out;
    const ELEMENT *bias;   // nullptr: there is none
    const ELEMENT *other;  // the residual (RESIDUAL) or the input of the GELU (SLOPE)
    ELEMENT *pre;          // written by GELU and RELU2
    int pitch, rows, columns, accumulate;

    // N runs of COUNT neighbours: the sums sum(i) of out[row][column ...] at where(i) = (row, column). All is read
    // before anything is written: a store would have to wait for each load before it, and the next load for the store.
    template <int COUNT, int N, class Where, class Sum>
    __device__ __forceinline__ void finish(Where where, Sum sum) const {
        Floats<COUNT> added[N] = {}, old[N] = {};
#pragma unroll
        for (int i = 0; i < N; i++) {
            int2 at = where(i);
            int valid = valid_at<COUNT>(at);
            if (BIASED && bias) added[i] = read_run<COUNT>(bias + at.y, valid);
            if constexpr (READS) old[i] = read_run<COUNT>(other + offset(at), valid);
            if (EPILOGUE == STORE && accumulate) old[i] = read_run<COUNT>(out + offset(at), valid);
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            int2 at = where(i);
            int valid = valid_at<COUNT>(at);
            Floats<COUNT> y = sum(i);
#pragma unroll
            for (int e = 0; e < COUNT; e++) y.at[e] = finished(y.at[e], added[i].at[e], old[i].at[e]);
            if constexpr (KEEPS) {
                write_run(pre + offset(at), valid, y);
                y = activated(y);
            }
            write_run(out + offset(at), valid, y);
        }
    }

    __device__ __forceinline__ int64_t offset(int2 at) const { return int64_t(at.x) * pitch + at.y; }

    // how many of COUNT neighbours lie inside
    template <int COUNT> __device__ __forceinline__ int valid_at(int2 at) const {
        return at.x < rows ? max(0, min(COUNT, columns - at.y)) : 0;
    }
};
