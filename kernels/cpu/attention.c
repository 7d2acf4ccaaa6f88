/* Attention in tiles of QUERIES x KEYS; a tile of scores lives in L2 and no (T, S) matrix exists.
 * Scores are computed by register tiles, and those wholly above the diagonal are skipped.
 * Source: Dao et al., FlashAttention, arXiv:2205.14135. */
#include "tiles.h"

#ifndef QUERIES
#define QUERIES 48
#endif
#ifndef KEYS
#define KEYS 256
#endif
#define LINE (KEYS + 16) /* floats between rows of a tile: not a power of two, so that columns spread over L1 */

struct matrix {
    float *data;
    size b, h, t; /* strides in floats; the last dim is contiguous */
};

struct shape {
    size batch, heads, queries, keys, width;
    int causal;
};

INLINE float *row_of(const struct matrix *m, size b, size h, size t) {
    return m->data + b * m->b + h * m->h + t * m->t;
}

static size padded(size width) { return round_up(width, PANEL); }
static size packed(size keys, size width) { return round_up(keys, PANEL) * padded(width); }

/* Floats of work space, by how many packed copies of the keys and of a tile of queries a direction needs. */
size EXPORT(attention_work)(size keys, size width) {
    return 5 * packed(keys, width) + 3 * QUERIES * padded(width) + 2 * QUERIES * LINE + 16;
}

INLINE float *take(float **work, size floats) {
    float *start = *work;
    *work += floats;
    return start;
}

/* Row r of a tile sees its first seen(r) keys. */
INLINE size seen(size first, size keys, size r) { return most(0, least(keys, first + r)); }

/* s (rows, keys) = a (rows, d) times packed transposed keys; register tiles that no row sees are left out. */
static void tile_scores(size rows, size keys, size d, size first, const float *a, size ra, const float *bt, float *s) {
    for (size j = 0; j < keys; j += PANEL, bt += d * PANEL) {
        size from = most(0, j - first + 1) / ROWS * ROWS;
        for (size r = from; r < rows; r += ROWS)
            multiply(least(ROWS, rows - r), d, a + r * ra, ra, 1, bt, s + r * LINE + j, LINE, 0);
    }
}

/* out (rows, d) += p (rows, keys) times packed b (keys of `all`, d). */
static void tile_product(
    size rows, size keys, size d, size first, const float *p, const float *b, size all, float *out) {
    for (size j = 0; j < d; j += PANEL, b += all * PANEL)
        for (size r = 0; r < rows; r += ROWS) {
            size some = least(ROWS, rows - r);
            multiply(some, seen(first, keys, r + some - 1), p + r * LINE, LINE, 1, b, out + r * padded(d) + j, padded(d), 1);
        }
}

/* out (keys, d) += p (rows, keys) transposed times packed b (rows, d). */
static void tile_product_transposed(
    size rows, size keys, size d, size first, const float *p, const float *b, float *out) {
    for (size j = 0; j < d; j += PANEL, b += rows * PANEL)
        for (size k = 0; k < keys; k += ROWS) {
            size from = least(rows, most(0, k - first + 1));
            multiply(
                least(ROWS, keys - k), rows - from, p + from * LINE + k, 1, LINE, b + from * PANEL,
                out + k * padded(d) + j, padded(d), 1);
        }
}

static void fill(float *row, size from, size to, float value) {
    for (size i = from; i < to; i++) row[i] = value;
}

static void forward_head(
    const struct shape *shape, const struct draw *draw, size b, size h, const struct matrix *mq, const struct matrix *mk,
    const struct matrix *mv, const struct matrix *mo, float scale, float *lse, float *work) {
    const size t = shape->queries, s = shape->keys, d = shape->width, wide = padded(d), offset = s - t;
    float *keys = take(&work, packed(s, d)), *values = take(&work, packed(s, d));
    float *q = take(&work, QUERIES * wide), *o = take(&work, QUERIES * wide), *p = take(&work, QUERIES * LINE);
    pack_transposed(s, d, row_of(mk, b, h, 0), mk->t, keys);
    pack(s, d, row_of(mv, b, h, 0), mv->t, 1.0f, values);
    for (size i = 0; i < t; i += QUERIES) {
        size rows = least(QUERIES, t - i), visible = shape->causal ? offset + i + rows : s;
        float top[QUERIES], total[QUERIES];
        for (size r = 0; r < rows; r++) {
            const float *from = row_of(mq, b, h, i + r);
            for (size k = 0; k < d; k++) q[r * wide + k] = from[k] * scale;
            top[r] = -__builtin_inff(), total[r] = 0;
        }
        memset(o, 0, (size_t)(rows * wide) * sizeof *o);
        for (size j = 0; j < visible; j += KEYS) {
            size count = least(KEYS, visible - j), first = shape->causal ? offset + i + 1 - j : s;
            tile_scores(rows, count, d, first, q, wide, keys + j * d, p);
            for (size r = 0; r < rows; r++) {
                size n = seen(first, count, r);
                float *row = p + r * LINE;
                if (n > 0) {
                    size full = round_up(n, LANES);
                    fill(row, n, full, -__builtin_inff());
                    vf most_of[PARTS], sum[PARTS] = {{0}};
                    for (int l = 0; l < PARTS; l++) most_of[l] = splat(top[r]);
                    for (size k = 0; k < full; k += LANES)
                        for (int l = 0; l < PARTS; l++) most_of[l] = MAX(load(row + k + l * W), most_of[l]);
                    float above = max_lanes(most_of);
                    for (size k = 0; k < full; k += LANES)
                        for (int l = 0; l < PARTS; l++) {
                            vf e = vexp(load(row + k + l * W) - above);
                            sum[l] += e;
                            store(row + k + l * W, e);
                        }
                    float change = j == 0 ? 0.0f : vexp(splat(top[r] - above))[0];
                    total[r] = total[r] * change + sum_lanes(sum);
                    top[r] = above;
                    if (j > 0)
                        for (size k = 0; k < wide; k += W) store(o + r * wide + k, load(o + r * wide + k) * change);
                    if (draw) {
                        float factors[KEYS];
                        uint64_t row_number = (uint64_t)((b * shape->heads + h) * t + i + r);
                        dropout_factors(draw, row_number * (uint64_t)s + (uint64_t)j, n, factors);
                        for (size k = 0; k < n; k++) row[k] *= factors[k];
                    }
                }
                fill(row, n, count, 0);
            }
            tile_product(rows, count, d, first, p, values + j * PANEL, s, o);
        }
        for (size r = 0; r < rows; r++) {
            float *to = row_of(mo, b, h, i + r);
            for (size k = 0; k < d; k++) to[k] = o[r * wide + k] / total[r];
            lse[(b * shape->heads + h) * t + i + r] = (float)((double)top[r] + log_of(total[r]));
        }
    }
}

static void backward_head(
    const struct shape *shape, const struct draw *draw, size b, size h, const struct matrix *const *m, float scale,
    const float *lse, float *work) {
    const struct matrix *mdo = m[0], *mq = m[1], *mk = m[2], *mv = m[3], *mo = m[4], *mdq = m[5], *mdk = m[6], *mdv = m[7];
    const size t = shape->queries, s = shape->keys, d = shape->width, wide = padded(d), offset = s - t;
    float *keys_t = take(&work, packed(s, d)), *values_t = take(&work, packed(s, d)), *keys = take(&work, packed(s, d));
    float *dk = take(&work, packed(s, d)), *dv = take(&work, packed(s, d));
    float *dq = take(&work, QUERIES * wide), *q = take(&work, QUERIES * wide), *dot = take(&work, QUERIES * wide);
    float *p = take(&work, QUERIES * LINE), *ds = take(&work, QUERIES * LINE);
    pack_transposed(s, d, row_of(mk, b, h, 0), mk->t, keys_t);
    pack_transposed(s, d, row_of(mv, b, h, 0), mv->t, values_t);
    pack(s, d, row_of(mk, b, h, 0), mk->t, scale, keys);
    memset(dk, 0, (size_t)(s * wide) * sizeof *dk);
    memset(dv, 0, (size_t)(s * wide) * sizeof *dv);
    for (size i = 0; i < t; i += QUERIES) {
        size rows = least(QUERIES, t - i), visible = shape->causal ? offset + i + rows : s;
        float delta[QUERIES];
        for (size r = 0; r < rows; r++) {
            const float *g = row_of(mdo, b, h, i + r), *o = row_of(mo, b, h, i + r);
            vf sum[PARTS] = {{0}};
            for (size k = 0; k < d; k += LANES)
                for (int l = 0; l < PARTS; l++) {
                    size some = most(0, d - k - l * W);
                    sum[l] = FMA(load_some(g + k + l * W, some, 0), load_some(o + k + l * W, some, 0), sum[l]);
                }
            delta[r] = sum_lanes(sum);
        }
        pack(rows, d, row_of(mq, b, h, i), mq->t, scale, q);
        pack(rows, d, row_of(mdo, b, h, i), mdo->t, 1.0f, dot);
        memset(dq, 0, (size_t)(rows * wide) * sizeof *dq);
        for (size j = 0; j < visible; j += KEYS) {
            size count = least(KEYS, visible - j), first = shape->causal ? offset + i + 1 - j : s;
            tile_scores(rows, count, d, first, row_of(mq, b, h, i), mq->t, keys_t + j * d, p);
            tile_scores(rows, count, d, first, row_of(mdo, b, h, i), mdo->t, values_t + j * d, ds);
            for (size r = 0; r < rows; r++) {
                size n = seen(first, count, r);
                float *row = p + r * LINE, *slope = ds + r * LINE, factors[KEYS + LANES];
                float level = lse[(b * shape->heads + h) * t + i + r];
                if (draw && n > 0) {
                    uint64_t row_number = (uint64_t)((b * shape->heads + h) * t + i + r);
                    dropout_factors(draw, row_number * (uint64_t)s + (uint64_t)j, n, factors);
                }
                for (size k = 0; k < n; k += W) { /* a tile has room for the whole last vector */
                    vf e = vexp(FMA(load(row + k), splat(scale), splat(-level)));
                    vf g = load(slope + k), factor = draw ? load(factors + k) : splat(1);
                    store(row + k, e * factor);
                    store(slope + k, FMA(g, factor, splat(-delta[r])) * e);
                }
                fill(row, n, count, 0);
                fill(slope, n, count, 0);
            }
            tile_product(rows, count, d, first, ds, keys + j * PANEL, s, dq);
            tile_product_transposed(rows, count, d, first, p, dot, dv + j * wide);
            tile_product_transposed(rows, count, d, first, ds, q, dk + j * wide);
        }
        for (size r = 0; r < rows; r++) memcpy(row_of(mdq, b, h, i + r), dq + r * wide, (size_t)d * sizeof *dq);
    }
    for (size k = 0; k < s; k++) {
        memcpy(row_of(mdk, b, h, k), dk + k * wide, (size_t)d * sizeof *dk);
        memcpy(row_of(mdv, b, h, k), dv + k * wide, (size_t)d * sizeof *dv);
    }
}

/* q (B, H, T, D), k and v (B, H, S, D) -> o, seen as (B, H, T, D), and lse (B, H, T). */
void EXPORT(attention_forward)(
    const struct shape *shape, const struct draw *draw, const struct matrix *q, const struct matrix *k,
    const struct matrix *v, const struct matrix *o, float scale, float *lse, float *work) {
    for (size b = 0; b < shape->batch; b++)
        for (size h = 0; h < shape->heads; h++)
            forward_head(shape, draw, b, h, q, k, v, o, scale, lse, align_line(work));
}

void EXPORT(attention_backward)(
    const struct shape *shape, const struct draw *draw, const struct matrix *dout, const struct matrix *q,
    const struct matrix *k, const struct matrix *v, const struct matrix *o, const struct matrix *dq,
    const struct matrix *dk, const struct matrix *dv, float scale, const float *lse, float *work) {
    const struct matrix *all[] = {dout, q, k, v, o, dq, dk, dv};
    for (size b = 0; b < shape->batch; b++)
        for (size h = 0; h < shape->heads; h++)
            backward_head(shape, draw, b, h, all, scale, lse, align_line(work));
}
#undef QUERIES
#undef KEYS
#undef LINE
