// Philox4x32-10 (Salmon et al., SC 2011), the words of mlm_mpi/rng.py: word e is word e mod 4 of counter
// (e div 4 low, e div 4 high, micro-batch, step).
#pragma once
#include "common.cuh"

struct Draw {
    uint32_t key0, key1, step, micro_batch;
    float rate, factor;  // dropped where uniform < rate, else times factor
};

// Which elements of a global array those of a cut of it are: in order, `extent` of the innermost dim, and so on outwards.
// Dims that lie together count as one.
struct Cut {
    uint64_t start;
    uint32_t extent[3];  // all but the outermost
    int64_t stride[3];   // all but the innermost, which is 1

    __device__ __forceinline__ uint64_t element(uint64_t i) const {
        uint64_t e = start;
        uint64_t place = i % extent[0];
        i /= extent[0], e += place;
#pragma unroll
        for (int dim = 1; dim < 3; dim++) {
            place = i % extent[dim];
            i /= extent[dim], e += place * stride[dim - 1];
        }
        return e + i * stride[2];
    }
};

struct Quad {
    uint32_t word[4];
};

// words 4 counter … 4 counter + 3
__device__ __forceinline__ Quad philox(const Draw &draw, uint64_t counter) {
    uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = draw.micro_batch, c3 = draw.step;
    uint32_t k0 = draw.key0, k1 = draw.key1;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0, c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1, c3 = uint32_t(p0);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

__device__ __forceinline__ float dropout_factor(const Draw &draw, uint32_t word) {
    return float(word >> 8) * 5.9604644775390625e-8f >= draw.rate ? draw.factor : 0.0f;  // 2^-24
}

// Factors 0 or 1 / (1 - rate) of the elements e … e + N - 1; with N > 1, e is a multiple of 4.
template <int N> __device__ __forceinline__ Pack<float, N> dropout_factors(const Draw &draw, uint64_t e) {
    Pack<float, N> factors;
    if constexpr (N == 1) {
        Quad quad = philox(draw, e / 4);
        uint32_t low = e & 1 ? quad.word[1] : quad.word[0], high = e & 1 ? quad.word[3] : quad.word[2];
        factors.at[0] = dropout_factor(draw, e & 2 ? high : low);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            Quad quad = philox(draw, (e + i) / 4);
            for (int w = 0; w < 4; w++) factors.at[i + w] = dropout_factor(draw, quad.word[w]);
        }
    }
    return factors;
}
