/* What every op file uses: vectors of W floats, loads that ask no alignment, exp.
 *
 * An `element` is a float, or, in the compilations of bf16_*.c, a bf16: what activations and the weights that layers
 * see consist of. It is widened as it is loaded and rounded to nearest even as it is stored; all between is float, and
 * so is what is summed over rows.
 *
 * Bits are decided by this text and not by the compiler: contraction is off (-ffp-contract=off), a fused
 * multiply-add is written FMA(), tails go through the same vector arithmetic as the rest, and sums run in
 * LANES partial sums at every level. So AVX2, AVX-512 and NEON give the same bits, by gcc and by clang
 * (`make test-isa`); x86-64's base level, which has no fused multiply-add, gives others. Which NaN an operation
 * makes is the CPU's affair. No result depends on the address of a buffer.
 */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint64_t vl __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef vf vf_any __attribute__((aligned(4), may_alias));
typedef vh vh_any __attribute__((aligned(2), may_alias));
typedef int64_t size;
typedef struct {
    uint16_t bits; /* the upper half of a float's */
} bf16;

#define INLINE static inline __attribute__((always_inline))
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#ifdef ELEMENT
typedef ELEMENT element;
#define NAME(name) JOIN(JOIN(name, ELEMENT), LEVEL)
#else
typedef float element;
#define NAME(name) JOIN(name, LEVEL)
#endif
#define IS_FLOAT (sizeof(element) == sizeof(float))
#define EXPORT(name) __attribute__((visibility("default"))) NAME(name)
#define LANES 16
#define PARTS (LANES / W)

/* MAX and MIN return the second operand where one is NaN. */
#if W == 16 && defined(__x86_64__)
#define FMA(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define MAX(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define MIN(a, b) ((vf)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define SQRT(a) ((vf)_mm512_sqrt_ps((__m512)(a)))
#elif W == 8 && defined(__x86_64__)
#define FMA(a, b, c) ((vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define MAX(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define MIN(a, b) ((vf)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define SQRT(a) ((vf)_mm256_sqrt_ps((__m256)(a)))
#elif W == 4 && defined(__SSE2__)
#define FMA(a, b, c) ((a) * (b) + (c))
#define MAX(a, b) ((vf)_mm_max_ps((__m128)(a), (__m128)(b)))
#define MIN(a, b) ((vf)_mm_min_ps((__m128)(a), (__m128)(b)))
#define SQRT(a) ((vf)_mm_sqrt_ps((__m128)(a)))
#elif W == 4 && defined(__aarch64__)
#define FMA(a, b, c) ((vf)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define MAX(a, b) pick((a) > (b), a, b)
#define MIN(a, b) pick((a) < (b), a, b)
#define SQRT(a) ((vf)vsqrtq_f32((float32x4_t)(a)))
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#define MAX(a, b) pick((a) > (b), a, b)
#define MIN(a, b) pick((a) < (b), a, b)
#define SQRT(a) sqrt_of(a)
INLINE vf sqrt_of(vf a) {
    for (int i = 0; i < W; i++) a[i] = __builtin_sqrtf(a[i]);
    return a;
}
#endif

/* Products of the low halves of 64-bit lanes. */
#if W == 16 && defined(__x86_64__)
#define WIDE_PRODUCT(a, b) ((vl)_mm512_mul_epu32((__m512i)(a), (__m512i)(b)))
#elif W == 8 && defined(__x86_64__)
#define WIDE_PRODUCT(a, b) ((vl)_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))
#elif W == 4 && defined(__SSE2__)
#define WIDE_PRODUCT(a, b) ((vl)_mm_mul_epu32((__m128i)(a), (__m128i)(b)))
#else
#define WIDE_PRODUCT(a, b) (((a) & 0xFFFFFFFFu) * ((b) & 0xFFFFFFFFu))
#endif

INLINE vf pick(vi where, vf a, vf b) { return (vf)((where & (vi)a) | (~where & (vi)b)); }
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE size least(size a, size b) { return a < b ? a : b; }
INLINE size most(size a, size b) { return a > b ? a : b; }
INLINE size round_up(size n, size to) { return (n + to - 1) / to * to; }
INLINE float *align_line(float *p) { return (float *)(((uintptr_t)p + 63) & ~(uintptr_t)63); }

/* How many sums join when piece i of `pieces` is complete, like carries of a binary counter: the tree of
 * mlm_mpi/comm/tree.py. Of the sums in between no more than the binary digits of `pieces` are kept. */
INLINE int joins(size i, size pieces) {
    return i + 1 < pieces ? __builtin_ctzll((unsigned long long)i + 1) : __builtin_popcountll((unsigned long long)i);
}

INLINE vf load_float(const float *p) { return *(const vf_any *)p; }
INLINE vf load_bf16(const bf16 *p) { return (vf)(__builtin_convertvector(*(const vh_any *)p, vu) << 16); }
INLINE float number_float(float x) { return x; }
INLINE float number_bf16(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

INLINE void store_float(float *p, vf v) { *(vf_any *)p = v; }

/* To nearest, ties to even; a NaN stays one. */
INLINE vh round_to_bf16(vf v) {
    const vu x = (vu)v, nan = (vu)((vi)(x & 0x7FFFFFFFu) > 0x7F800000), nearest = x + 0x7FFFu + (x >> 16 & 1u);
    return __builtin_convertvector(((nan & (x | 0x400000u)) | (~nan & nearest)) >> 16, vh);
}

INLINE void store_bf16(bf16 *p, vf v) { *(vh_any *)p = round_to_bf16(v); }

#define OF(function, p) \
    _Generic((p), float *: function##_float, const float *: function##_float, bf16 *: function##_bf16, \
        const bf16 *: function##_bf16)
#define load(p) OF(load, p)(p)
#define store(p, v) OF(store, p)(p, v)
#define number(x) _Generic((x), float: number_float, bf16: number_bf16)(x)

/* Of W elements the first n; the others are loaded as `fill`. */
INLINE vf load_some_float(const float *p, size n, float fill) {
    if (n >= W) return load(p);
    vf v = splat(fill);
    for (size i = 0; i < n; i++) v[i] = p[i];
    return v;
}

INLINE void store_some_float(float *p, size n, vf v) {
    if (n >= W) {
        store(p, v);
        return;
    }
    for (size i = 0; i < n; i++) p[i] = v[i];
}

/* Tails of bf16 are functions: in line they would be half of the code. */
static __attribute__((noinline, unused)) vf load_tail(const bf16 *p, size n, float fill) {
    vf v = splat(fill);
    for (size i = 0; i < n; i++) v[i] = number(p[i]);
    return v;
}

static __attribute__((noinline, unused)) void store_tail(bf16 *p, size n, vf v) {
    const vh rounded = round_to_bf16(v);
    for (size i = 0; i < n; i++) p[i].bits = rounded[i];
}

INLINE vf load_some_bf16(const bf16 *p, size n, float fill) { return n >= W ? load(p) : load_tail(p, n, fill); }

INLINE void store_some_bf16(bf16 *p, size n, vf v) {
    if (n >= W)
        store(p, v);
    else
        store_tail(p, n, v);
}

#define load_some(p, n, fill) OF(load_some, p)(p, n, fill)
#define store_some(p, n, v) OF(store_some, p)(p, n, v)

/* n elements as floats: where they lie, or, if they are none, in `room`. */
INLINE float *widened(size n, const element *x, float *room) {
    if (IS_FLOAT) return (float *)x;
    for (size i = 0; i < n; i += W) store_some(room + i, n - i, load_some(x + i, n - i, 0));
    return room;
}

/* What `widened` gave goes back to where it was taken from. */
INLINE void give_back(size n, const float *x, element *to) {
    for (size i = 0; i < n && !IS_FLOAT; i += W) store_some(to + i, n - i, load_some(x + i, n - i, 0));
}

/* Sum of the lanes of LANES partial sums, in halves: the same tree at every level. */
INLINE float sum_lanes(const vf *part) {
    float x[LANES];
    memcpy(x, part, sizeof x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

/* 1 / sqrt(mean(x^2) + epsilon) of n elements. */
INLINE float inverse_root(size n, const element *x, float epsilon) {
    vf squares[PARTS] = {{0}};
    for (size i = 0; i < n; i += LANES)
        for (int j = 0; j < PARTS; j++) {
            vf v = load_some(x + i + j * W, most(0, n - i - j * W), 0);
            squares[j] = FMA(v, v, squares[j]);
        }
    return 1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)n + epsilon);
}

INLINE float max_lanes(const vf *part) {
    float x[LANES];
    memcpy(x, part, sizeof x);
    for (int i = 1; i < LANES; i++) x[0] = x[i] > x[0] ? x[i] : x[0];
    return x[0];
}

/* exp in 1.0 ulp (2 ulp at the base level), with infinities, NaN and subnormal results.
 * x = n ln 2 + r, a polynomial of r (Cephes, S. Moshier), times 2^n in two factors. */
INLINE vf vexp(vf x) {
    const vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    x = MAX(splat(-104.0f), x);
    x = MIN(splat(89.0f), x);
    vf t = FMA(x, splat(1.44269504088896341f), magic);
    vi e = (vi)t - 0x4B400000;
    vf n = t - magic;
    vf r = FMA(n, splat(-0.693359375f), x);
    r = FMA(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = FMA(p, r, splat(1.3981999507e-3f));
    p = FMA(p, r, splat(8.3334519073e-3f));
    p = FMA(p, r, splat(4.1665795894e-2f));
    p = FMA(p, r, splat(1.6666665459e-1f));
    p = FMA(p, r, splat(5.0000001201e-1f));
    p = FMA(p, r * r, r) + 1.0f;
    vi half = e >> 1;
    return p * (vf)((half + 127) << 23) * (vf)((e - half + 127) << 23);
}

INLINE vf sigmoid(vf a) { return 1.0f / (1.0f + vexp(-a)); }

/* tanh: an odd polynomial below 0.625 (Cephes, S. Moshier), 1 - 2 / (exp(2|x|) + 1) with x's sign from there on. */
INLINE vf vtanh(vf x) {
    const vi sign = (vi)x & (int32_t)0x80000000;
    const vf size_of = (vf)((vi)x & 0x7FFFFFFF), z = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = FMA(p, z, splat(2.06390887954e-2f));
    p = FMA(p, z, splat(-5.37397155531e-2f));
    p = FMA(p, z, splat(1.33314422036e-1f));
    p = FMA(p, z, splat(-3.33332819422e-1f));
    const vf far = 1.0f - 2.0f / (vexp(size_of + size_of) + 1.0f);
    return pick(size_of < splat(0.625f), FMA(p * z, x, x), (vf)((vi)far | sign));
}

/* Natural logarithm of a positive normal number or infinity, to 1e-13: one per row, so plain C. */
INLINE double log_of(double x) {
    uint64_t bits;
    if (!(x < 1.0 / 0.0)) return x; /* infinity, NaN */
    memcpy(&bits, &x, 8);
    int64_t e = (int64_t)(bits >> 52) - 1023;
    bits = (bits & 0xFFFFFFFFFFFFFull) | 0x3FF0000000000000ull;
    memcpy(&x, &bits, 8);
    if (x > 1.4142135623730951) x *= 0.5, e++;
    double s = (x - 1.0) / (x + 1.0), s2 = s * s, sum = 0.0;
    for (int k = 17; k > 0; k -= 2) sum = sum * s2 + 1.0 / k;
    return 2.0 * s * sum + (double)e * 0.6931471805599453;
}

#define PANEL (2 * W) /* columns of a register tile, and the width of a packed panel of the right factor */
