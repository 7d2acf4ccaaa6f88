/* Philox4x32-10 (Salmon et al., SC 2011), the words of mlm_mpi/rng.py: word e is word e mod 4 of counter
 * (e div 4 low, e div 4 high, micro-batch, step). */
#define QUADS 64 /* counters at a time */

struct draw {
    uint32_t key0, key1, step, micro_batch;
    float rate, factor; /* dropped where uniform < rate, else times factor */
    uint64_t start, stride[3]; /* row (i, j, k) of the local array: elements start + i, j, k times strides … of the global */
};

INLINE uint64_t row_start(const struct draw *draw, size i, size j, size k) {
    return draw->start + (uint64_t)i * draw->stride[0] + (uint64_t)j * draw->stride[1] + (uint64_t)k * draw->stride[2];
}

/* Counters lie in 64-bit lanes of which only the low half counts: what products leave above it is never read. */
static void philox_words(const struct draw *draw, uint64_t first, uint32_t *words) {
    for (int l = 0; l < QUADS; l += W / 2) {
        vl c0, c1, c2 = (vl){0} + draw->micro_batch, c3 = (vl){0} + draw->step;
        for (int i = 0; i < W / 2; i++) c0[i] = first + (uint64_t)(l + i);
        c1 = c0 >> 32;
        uint32_t k0 = draw->key0, k1 = draw->key1;
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++) {
            vl p0 = WIDE_PRODUCT(c0, (vl){0} + 0xD2511F53u), p1 = WIDE_PRODUCT(c2, (vl){0} + 0xCD9E8D57u);
            c0 = (p1 >> 32) ^ c1 ^ k0;
            c1 = p1;
            c2 = (p0 >> 32) ^ c3 ^ k1;
            c3 = p0;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        for (int i = 0; i < W / 2; i++, words += 4)
            words[0] = (uint32_t)c0[i], words[1] = (uint32_t)c1[i], words[2] = (uint32_t)c2[i], words[3] = (uint32_t)c3[i];
    }
}

/* Factors 0 or 1/(1 - rate) of elements start … start + n - 1 of the global array. */
static void dropout_factors(const struct draw *draw, uint64_t start, size n, float *out) {
    uint32_t words[4 * QUADS];
    size skip = (size)(start % 4);
    for (uint64_t first = start / 4; n > 0; first += QUADS, skip = 0) {
        philox_words(draw, first, words);
        size count = least(n, 4 * QUADS - skip);
        for (size i = 0; i < count; i++) {
            float uniform = (float)(int32_t)(words[skip + i] >> 8) * 0x1p-24f;
            out[i] = uniform >= draw->rate ? draw->factor : 0.0f;
        }
        out += count, n -= count;
    }
}

/* y = x times the factors of elements from `start` on, plus residual where given. */
static void dropout_row(
    const struct draw *draw, uint64_t start, size n, const element *x, const element *residual, element *y) {
    float factors[4 * QUADS];
    for (size a = 0; a < n; a += 4 * QUADS) {
        size count = least(4 * QUADS, n - a);
        dropout_factors(draw, start + (uint64_t)a, count, factors);
        for (size i = 0; i < count; i += W) {
            size some = count - i;
            vf v = load_some(x + a + i, some, 0) * load_some(factors + i, some, 0);
            if (residual) v += load_some(residual + a + i, some, 0);
            store_some(y + a + i, some, v);
        }
    }
}

/* shape: rows in three dims, and their width. */
void EXPORT(dropout_mask)(const size *shape, const struct draw *draw, element *out) {
    float factors[4 * QUADS];
    for (size i = 0; i < shape[0]; i++)
        for (size j = 0; j < shape[1]; j++)
            for (size k = 0; k < shape[2]; k++, out += shape[3])
                for (size a = 0; a < shape[3]; a += 4 * QUADS) {
                    const size count = least(4 * QUADS, shape[3] - a);
                    dropout_factors(draw, row_start(draw, i, j, k) + (uint64_t)a, count, factors);
                    for (size e = 0; e < count; e += W)
                        store_some(out + a + e, count - e, load_some(factors + e, count - e, 0));
                }
}

/* y = x times the mask, plus residual where given; y may be x. */
void EXPORT(dropout_forward)(
    const size *shape, const element *x, const struct draw *draw, const element *residual, element *y) {
    for (size i = 0; i < shape[0]; i++)
        for (size j = 0; j < shape[1]; j++)
            for (size k = 0; k < shape[2]; k++, x += shape[3], y += shape[3]) {
                dropout_row(draw, row_start(draw, i, j, k), shape[3], x, residual, y);
                if (residual) residual += shape[3];
            }
}
#undef QUADS
