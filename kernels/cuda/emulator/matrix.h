// What a warp's matrix instructions do: mma.sync, ldmatrix, stmatrix.
#pragma once
namespace cu {

inline float from_bf16(uint32_t bits) {
    bits <<= 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// to the nearest, even on a tie; any NaN becomes cvt.rn's 0x7fff
inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// .ftz: a number below the normal range becomes a zero of its sign
inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// Which element of a 16 x 16 operand A the `half` of register `i` of a lane holds; an accumulator's floats lie likewise.
inline int fragment_row(int lane, int i) { return lane / 4 + i % 2 * 8; }
inline int fragment_column(int lane, int i, int half) { return lane % 4 * 2 + i / 2 * 8 + half; }

struct MmaLane {
    uint32_t a[4], b[2];
    float d[4];
};

inline void mma_of_warp(Group &group, int parity) {
    float a[16][16], b[16][8], c[16][8] = {};
    for (int lane = 0; lane < 32; lane++) {
        auto &in = *reinterpret_cast<const MmaLane *>(group.in[parity][lane]);
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 4; i++)
                a[fragment_row(lane, i)][fragment_column(lane, i, half)] = from_bf16(in.a[i] >> 16 * half & 0xffff);
            for (int i = 0; i < 2; i++)
                b[lane % 4 * 2 + i * 8 + half][lane / 4] = from_bf16(in.b[i] >> 16 * half & 0xffff);
        }
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < 32; lane++) {
        auto &in = *reinterpret_cast<const MmaLane *>(group.in[parity][lane]);
        auto *out = reinterpret_cast<float *>(group.out[parity][lane]);
        for (int i = 0; i < 4; i++) out[i] = in.d[i] + c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
}

inline void mma_m16n8k16(float *d, const uint32_t *a, const uint32_t *b) {
    MmaLane in;
    std::memcpy(in.a, a, sizeof in.a);
    std::memcpy(in.b, b, sizeof in.b);
    std::memcpy(in.d, d, sizeof in.d);
    std::memcpy(d, collective(~0u, &in, sizeof in, "mma.sync", mma_of_warp), sizeof in.d);
}

// Where the `half` of a lane's register lies in its 8 x 8 matrix.
inline int matrix_row(int lane, int half, bool trans) { return trans ? lane % 4 * 2 + half : lane / 4; }
inline int matrix_column(int lane, int half, bool trans) { return trans ? lane / 4 : lane % 4 * 2 + half; }

struct MatrixLane {
    unsigned char *row;
    uint32_t r[4];
};

inline unsigned char *checked_row(const void *row, const char *what) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("%s: the address of a row is not a multiple of 16", what);
    return static_cast<unsigned char *>(const_cast<void *>(row));
}

// calls body(register of a lane, its half of memory) for each element of COUNT matrices
template <int COUNT, bool TRANS, class F> inline void over_matrices(Group &group, int parity, F body) {
    for (int matrix = 0; matrix < COUNT; matrix++)
        for (int lane = 0; lane < 32; lane++)
            for (int half = 0; half < 2; half++) {
                int owner = matrix * 8 + matrix_row(lane, half, TRANS);
                auto *row = reinterpret_cast<const MatrixLane *>(group.in[parity][owner])->row;
                Loud loud;
                body(lane, matrix * 2 + half, row + 2 * matrix_column(lane, half, TRANS));
            }
}

template <int COUNT, bool TRANS> inline void ldmatrix(uint32_t *r, const void *row) {
    bool used = current->lane < 8 * COUNT;
    MatrixLane in{used ? checked_row(row, "ldmatrix") : nullptr, {}};
    auto *out = collective(~0u, &in, sizeof in, "ldmatrix", [](Group &group, int parity) {
        over_matrices<COUNT, TRANS>(group, parity, [&](int lane, int element, unsigned char *memory) {
            std::memcpy(group.out[parity][lane] + 2 * element, memory, 2);
        });
    });
    std::memcpy(r, out, 4 * COUNT);
}

template <bool TRANS> inline void stmatrix_x4(void *row, const uint32_t *r) {
    MatrixLane in{checked_row(row, "stmatrix"), {r[0], r[1], r[2], r[3]}};
    collective(~0u, &in, sizeof in, "stmatrix", [](Group &group, int parity) {
        over_matrices<4, TRANS>(group, parity, [&](int lane, int element, unsigned char *memory) {
            auto &from = *reinterpret_cast<const MatrixLane *>(group.in[parity][lane]);
            std::memcpy(memory, reinterpret_cast<const unsigned char *>(from.r) + 2 * element, 2);
        });
    });
}

inline bool elect_one() {
    struct Choice {
        int lane;
    } none{-1};
    auto *out = collective(~0u, &none, sizeof none, "elect.sync", [](Group &group, int parity) {
        int chosen = draw() % 32;  // hardware promises no particular lane
        while (!(group.mask >> chosen & 1)) chosen = (chosen + 1) % 32;
        for (int lane = 0; lane < 32; lane++) std::memcpy(group.out[parity][lane], &chosen, sizeof chosen);
    });
    return *reinterpret_cast<const int *>(out) == current->lane;
}

}  // namespace cu
