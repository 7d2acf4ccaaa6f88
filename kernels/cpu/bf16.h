/* Products of bf16 as VDPBF16PS of Intel's manual (volume 2) defines them, in plain C or by the instruction.
 *
 * A word holds two steps of k: the even one in its low half, the odd one in its high half. */

/* The half of a word that a bf16 as a float becomes: what is subnormal is a zero of its sign, as to the instruction. */
INLINE uint32_t half_word(uint32_t x) { return x & 0x7F800000u ? x >> 16 : x >> 31 << 15; }

/* A packed strip (steps, width) of floats becomes one of words, in its own place or before it; an odd step out is paired
 * with 0. */
INLINE void pair_steps(size steps, const int width, const float *strip, float *to) {
    for (size i = 0; i < steps; i += 2) {
        uint32_t even[2 * LANES], odd[2 * LANES] = {0}; /* no strip is wider at any level */
        const size bytes = (size_t)width * sizeof *strip;
        memcpy(even, strip + i * width, bytes);
        if (i + 1 < steps) memcpy(odd, strip + (i + 1) * width, bytes);
        for (int lane = 0; lane < width; lane++) even[lane] = half_word(even[lane]) | half_word(odd[lane]) << 16;
        memcpy(to + i / 2 * width, even, bytes);
    }
}

#ifdef BF16_INSTRUCTION
INLINE vf dot2(vf sum, vi a, vi b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
#else
INLINE vf fused(vf a, vf b, vf c) {
#if W == 4 && defined(__SSE2__)
    for (int i = 0; i < W; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return FMA(a, b, c);
#endif
}

INLINE vf flush(vf x) {
    vi exponent = (vi)x & 0x7F800000, sign = (vi)x & (int32_t)0x80000000;
    return pick(exponent == 0, (vf)sign, x);
}

/* sum + a b: two multiply-adds, the odd step first, each rounded to nearest even and flushed where subnormal. */
INLINE vf dot2(vf sum, vi a, vi b) {
    const vi odd = (vi){0} + (int32_t)0xFFFF0000;
    sum = flush(fused((vf)(a & odd), (vf)(b & odd), sum));
    return flush(fused((vf)(a << 16), (vf)(b << 16), sum));
}
#endif
