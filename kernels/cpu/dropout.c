/* Philox4x32-10 (Salmon et al., SC 2011), the words of mlm_mpi/rng.py: word e is word e mod 4 of counter
 * (e div 4 low, e div 4 high, micro-batch, step). */
#define QUADS 64 /* counters at a time */

struct draw {
    uint32_t key0, key1, step, micro_batch;
    float rate, factor; /* dropped where uniform < rate, else times factor */
};

static void philox_words(const struct draw *draw, uint64_t first, uint32_t *restrict words) {
#pragma omp simd
    for (int l = 0; l < QUADS; l++) {
        uint32_t c0 = (uint32_t)(first + (uint64_t)l), c1 = (uint32_t)((first + (uint64_t)l) >> 32);
        uint32_t c2 = draw->micro_batch, c3 = draw->step, k0 = draw->key0, k1 = draw->key1;
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++) {
            uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
            c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
            c1 = (uint32_t)p1;
            c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
            c3 = (uint32_t)p0;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        words[4 * l] = c0, words[4 * l + 1] = c1, words[4 * l + 2] = c2, words[4 * l + 3] = c3;
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

void EXPORT(dropout_mask)(size n, const struct draw *draw, size start, float *out) {
    dropout_factors(draw, (uint64_t)start, n, out);
}

/* y = x times the mask, plus residual where given; y may be x. */
void EXPORT(dropout_forward)(
    size n, const float *x, const struct draw *draw, size start, const float *residual, float *y) {
    float factors[4 * QUADS];
    for (size a = 0; a < n; a += 4 * QUADS) {
        size count = least(4 * QUADS, n - a);
        dropout_factors(draw, (uint64_t)(start + a), count, factors);
        for (size i = 0; i < count; i += W) {
            size some = count - i;
            vf v = load_some(x + a + i, some, 0) * load_some(factors + i, some, 0);
            if (residual) v += load_some(residual + a + i, some, 0);
            store_some(y + a + i, some, v);
        }
    }
}
#undef QUADS
