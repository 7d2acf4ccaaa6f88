/* Attention in tiles of QUERIES x KEYS; a tile of scores lives in L2 and no (T, S) matrix exists.
 * Scores are computed by register tiles, and those wholly above the diagonal are skipped.
 * Source: Dao et al., FlashAttention, arXiv:2205.14135.
 *
 * The order of additions. Positions are absolute, and shares end at the multiples of shape.share; tiles begin anew
 * there. The softmax over the keys of a share is computed by itself, and the partial results (maximum, sum, values not
 * yet divided by it) are merged in ascending order: merge_row. The gradient of a query is a sum for every share of keys,
 * that of a key a sum for every share of queries, and these are added in ascending order. So every pair of shares may
 * be computed elsewhere, as in a ring of ranks. A pair in which nothing is seen contributes nothing, not even zeros. */
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
    size query, key, share; /* positions of the first query and of the first key; positions in a share */
    int causal;
};

INLINE float *row_of(const struct matrix *m, size b, size h, size t) {
    return m->data + b * m->b + h * m->h + t * m->t;
}

static size padded(size width) { return round_up(width, PANEL); }
static size packed(size keys, size width) { return round_up(keys, PANEL) * padded(width); }

/* Where the share of row `at` ends; row 0 has position `first`. */
INLINE size border(size first, size at, size share, size rows) {
    return least(rows, ((first + at) / share + 1) * share - first);
}

INLINE size key_border(const struct shape *shape, size j) { return border(shape->key, j, shape->share, shape->keys); }

INLINE size query_border(const struct shape *shape, size i) {
    return border(shape->query, i, shape->share, shape->queries);
}

/* How many keys the queries before row i see together. */
INLINE size visible(const struct shape *shape, size i) {
    return shape->causal ? most(0, least(shape->keys, shape->query + i - shape->key)) : shape->keys;
}

/* How many of the keys from j on query i sees; more than there are where it sees all. */
INLINE size reach(const struct shape *shape, size i, size j) {
    return shape->causal ? shape->query + i + 1 - shape->key - j : shape->keys;
}

/* Tiles of queries that stay packed: those of a share that meets several shares of keys. */
static size tiles_kept(const struct shape *shape) {
    if (key_border(shape, 0) == shape->keys) return 1;
    return (least(shape->share, shape->queries) + QUERIES - 1) / QUERIES;
}

/* Floats of work space for either direction. */
size EXPORT(attention_work)(const struct shape *shape) {
    const size wide = padded(shape->width), share = least(shape->share, shape->keys);
    size panels = 0; /* keys, padded in every share */
    for (size j = 0, stop; j < shape->keys; j = stop) {
        stop = key_border(shape, j);
        panels += round_up(stop - j, PANEL);
    }
    return 2 * packed(panels, shape->width) + packed(shape->keys, shape->width) + 2 * share * wide + 3 * QUERIES * wide +
           tiles_kept(shape) * QUERIES * (2 * wide + 1) + 2 * QUERIES * LINE + 16;
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

/* x (keys, d) transposed, every share in panels of its own. */
static void pack_shares(const struct shape *shape, const float *x, size stride, float *panels) {
    for (size j = 0, stop; j < shape->keys; j = stop) {
        stop = key_border(shape, j);
        pack_transposed(stop - j, shape->width, x + j * stride, stride, panels);
        panels += round_up(stop - j, PANEL) * shape->width;
    }
}

/* A tile of queries and what a softmax over some keys made of it. */
struct partial {
    float top[QUERIES], total[QUERIES], *o; /* of every row: the maximum, the sum, values not yet divided by it */
};

/* mine = mine and other, whose keys come behind mine. Who has seen no key, (-inf, 0, 0), changes nothing. */
INLINE void merge_row(
    size d, float *top, float *total, float *o, float other_top, float other_total, const float *other_o) {
    const float above = other_top > *top ? other_top : *top, level = above > -__builtin_inff() ? above : 0.0f;
    vf both = splat(*top - level);
    both[1] = other_top - level;
    both = vexp(both);
    const vf mine = splat(both[0]), other = splat(both[1]);
    *top = above;
    *total = FMA(splat(*total), mine, splat(other_total) * other)[0];
    for (size k = 0; k < d; k += W) {
        size some = d - k;
        store_some(o + k, some, FMA(load_some(o + k, some, 0), mine, load_some(other_o + k, some, 0) * other));
    }
}

/* out = o / total, where a query sees a key; returns the log-sum-exp. */
INLINE float finish_row(size d, const float *o, float top, float total, float *out) {
    for (size k = 0; k < d; k++) out[k] = total == 0 ? 0.0f : o[k] / total;
    return total == 0 ? top : (float)((double)top + log_of(total));
}

/* The softmax of query rows i … over the keys j … stop - 1 of one share, whose transposed panels are `keys`. */
static void attend(
    const struct shape *shape, const struct draw *draw, size b, size h, size i, size rows, size j, size stop,
    const float *q, const float *keys, const float *values, float *p, struct partial *to) {
    const size d = shape->width, wide = padded(d), start = j;
    float *top = to->top, *total = to->total, *o = to->o;
    for (size r = 0; r < rows; r++) top[r] = -__builtin_inff(), total[r] = 0;
    memset(o, 0, (size_t)(rows * wide) * sizeof *o);
    for (; j < stop; j += KEYS) {
        size count = least(KEYS, stop - j), first = reach(shape, i, j);
        tile_scores(rows, count, d, first, q, wide, keys + (j - start) * d, p);
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
                float change = j == start ? 0.0f : vexp(splat(top[r] - above))[0];
                total[r] = total[r] * change + sum_lanes(sum);
                top[r] = above;
                if (j > start)
                    for (size k = 0; k < wide; k += W) store(o + r * wide + k, load(o + r * wide + k) * change);
                if (draw) {
                    float factors[KEYS];
                    dropout_factors(draw, row_start(draw, b, h, i + r) + (uint64_t)j, n, factors);
                    for (size k = 0; k < n; k++) row[k] *= factors[k];
                }
            }
            fill(row, n, count, 0);
        }
        tile_product(rows, count, d, first, p, values + j * PANEL, shape->keys, o);
    }
}

/* With `sums` the result is partial: o is not divided, and `levels` are maxima. */
static void forward_head(
    const struct shape *shape, const struct draw *draw, size b, size h, const struct matrix *mq, const struct matrix *mk,
    const struct matrix *mv, const struct matrix *mo, float scale, float *levels, float *sums, float *work) {
    const size t = shape->queries, s = shape->keys, d = shape->width, wide = padded(d);
    float *values = take(&work, packed(s, d)), *q = take(&work, QUERIES * wide), *p = take(&work, QUERIES * LINE);
    struct partial all, part;
    all.o = take(&work, QUERIES * wide), part.o = take(&work, QUERIES * wide);
    pack(s, d, row_of(mv, b, h, 0), mv->t, 1.0f, values);
    pack_shares(shape, row_of(mk, b, h, 0), mk->t, work);
    for (size i = 0, stop; i < t; i = stop) {
        stop = least(i + QUERIES, query_border(shape, i));
        const size rows = stop - i, keys = visible(shape, stop);
        for (size r = 0; r < rows; r++) {
            const float *from = row_of(mq, b, h, i + r);
            for (size k = 0; k < d; k++) q[r * wide + k] = from[k] * scale;
        }
        const float *panels = work;
        attend(shape, draw, b, h, i, rows, 0, least(keys, key_border(shape, 0)), q, panels, values, p, &all);
        for (size from = 0, j = key_border(shape, 0); j < keys; from = j, j = key_border(shape, j)) {
            panels += round_up(j - from, PANEL) * d;
            attend(shape, draw, b, h, i, rows, j, least(keys, key_border(shape, j)), q, panels, values, p, &part);
            for (size r = 0; r < rows; r++)
                merge_row(wide, all.top + r, all.total + r, all.o + r * wide, part.top[r], part.total[r], part.o + r * wide);
        }
        for (size r = 0; r < rows; r++) {
            float *to = row_of(mo, b, h, i + r);
            const size at = (b * shape->heads + h) * t + i + r;
            if (sums) {
                memcpy(to, all.o + r * wide, (size_t)d * sizeof *to);
                levels[at] = all.top[r], sums[at] = all.total[r];
            } else
                levels[at] = finish_row(d, all.o + r * wide, all.top[r], all.total[r], to);
        }
    }
}

/* What the pairs of shares of a head have in common. */
struct pass {
    const struct shape *shape;
    const struct draw *draw;
    size b, h;
    const struct matrix *dout, *q, *k, *v, *o, *dq, *dk, *dv;
    float scale;
    const float *lse;
    float *q_tiles, *do_tiles, *deltas; /* tiles of queries, packed; their Σ do·o */
    float *sum_k, *sum_v, *sum_q;       /* gradients of a share of keys and of a tile of queries */
    float *p, *ds;
};

static void prepare_tile(const struct pass *pass, size i, size rows, float *q, float *dot, float *delta) {
    const size d = pass->shape->width, b = pass->b, h = pass->h;
    for (size r = 0; r < rows; r++) {
        const float *g = row_of(pass->dout, b, h, i + r), *o = row_of(pass->o, b, h, i + r);
        vf sum[PARTS] = {{0}};
        for (size k = 0; k < d; k += LANES)
            for (int l = 0; l < PARTS; l++) {
                size some = most(0, d - k - l * W);
                sum[l] = FMA(load_some(g + k + l * W, some, 0), load_some(o + k + l * W, some, 0), sum[l]);
            }
        delta[r] = sum_lanes(sum);
    }
    pack(rows, d, row_of(pass->q, b, h, i), pass->q->t, pass->scale, q);
    pack(rows, d, row_of(pass->dout, b, h, i), pass->dout->t, 1.0f, dot);
}

/* Rows at + 0, 1, … of x are written, or added to where a share came before. */
static void deposit(const struct pass *pass, const struct matrix *x, size at, size rows, const float *sum, int add) {
    const size d = pass->shape->width, wide = padded(d);
    for (size r = 0; r < rows; r++, sum += wide) {
        float *to = row_of(x, pass->b, pass->h, at + r);
        if (add)
            for (size k = 0; k < d; k++) to[k] += sum[k];
        else
            memcpy(to, sum, (size_t)d * sizeof *to);
    }
}

static void clear(const struct pass *pass, const struct matrix *x, size from, size to) {
    for (size r = from; r < to; r++) memset(row_of(x, pass->b, pass->h, r), 0, (size_t)pass->shape->width * sizeof(float));
}

/* Weights of a tile in p, and the gradient of its scores in ds: from scores, and from do·v. */
static void tile_gradient(const struct pass *pass, size i, size rows, size j, size count, size first, const float *delta) {
    const struct draw *draw = pass->draw;
    const size b = pass->b, h = pass->h;
    const float scale = pass->scale, *lse = pass->lse + (b * pass->shape->heads + h) * pass->shape->queries + i;
    for (size r = 0; r < rows; r++) {
        size n = seen(first, count, r);
        float *row = pass->p + r * LINE, *slope = pass->ds + r * LINE, factors[KEYS + LANES];
        if (draw && n > 0) dropout_factors(draw, row_start(draw, b, h, i + r) + (uint64_t)j, n, factors);
        for (size k = 0; k < n; k += W) { /* a tile has room for the whole last vector */
            vf e = vexp(FMA(load(row + k), splat(scale), splat(-lse[r])));
            vf g = load(slope + k), factor = draw ? load(factors + k) : splat(1);
            store(row + k, e * factor);
            store(slope + k, FMA(g, factor, splat(-delta[r])) * e);
        }
        fill(row, n, count, 0);
        fill(slope, n, count, 0);
    }
}

/* Queries i … i_stop - 1 and keys j … j_stop - 1, a share each; the panels of the keys are those of the share. */
static void backward_pair(
    const struct pass *pass, size i, size i_stop, size start, size j_stop, const float *keys_t, const float *values_t,
    const float *keys) {
    const struct shape *shape = pass->shape;
    const size d = shape->width, wide = padded(d), kept = tiles_kept(shape);
    memset(pass->sum_k, 0, (size_t)((j_stop - start) * wide) * sizeof(float));
    memset(pass->sum_v, 0, (size_t)((j_stop - start) * wide) * sizeof(float));
    for (size tile = 0; i < i_stop; i += QUERIES, tile = (tile + 1) % kept) {
        const size rows = least(QUERIES, i_stop - i), stop = least(j_stop, visible(shape, i + rows));
        float *q = pass->q_tiles + tile * QUERIES * wide, *dot = pass->do_tiles + tile * QUERIES * wide;
        float *delta = pass->deltas + tile * QUERIES;
        if (start == 0) prepare_tile(pass, i, rows, q, dot, delta);
        memset(pass->sum_q, 0, (size_t)(rows * wide) * sizeof(float));
        for (size j = start; j < stop; j += KEYS) {
            const size count = least(KEYS, stop - j), first = reach(shape, i, j), at = j - start;
            tile_scores(rows, count, d, first, row_of(pass->q, pass->b, pass->h, i), pass->q->t, keys_t + at * d, pass->p);
            tile_scores(
                rows, count, d, first, row_of(pass->dout, pass->b, pass->h, i), pass->dout->t, values_t + at * d, pass->ds);
            tile_gradient(pass, i, rows, j, count, first, delta);
            tile_product(rows, count, d, first, pass->ds, keys + j * PANEL, shape->keys, pass->sum_q);
            tile_product_transposed(rows, count, d, first, pass->p, dot, pass->sum_v + at * wide);
            tile_product_transposed(rows, count, d, first, pass->ds, q, pass->sum_k + at * wide);
        }
        deposit(pass, pass->dq, i, rows, pass->sum_q, start > 0);
    }
}

static void backward_head(struct pass *pass, float *work) {
    const struct shape *shape = pass->shape;
    const size s = shape->keys, d = shape->width, wide = padded(d), share = least(shape->share, s);
    const size kept = tiles_kept(shape) * QUERIES, b = pass->b, h = pass->h;
    float *keys = take(&work, packed(s, d));
    pass->sum_k = take(&work, share * wide), pass->sum_v = take(&work, share * wide);
    pass->sum_q = take(&work, QUERIES * wide);
    pass->q_tiles = take(&work, kept * wide), pass->do_tiles = take(&work, kept * wide);
    pass->p = take(&work, QUERIES * LINE), pass->ds = take(&work, QUERIES * LINE);
    pass->deltas = take(&work, kept);
    size panels = 0;
    for (size j = 0, stop; j < s; j = stop) stop = key_border(shape, j), panels += round_up(stop - j, PANEL);
    float *keys_t = take(&work, panels * d), *values_t = take(&work, panels * d);
    pack_shares(shape, row_of(pass->k, b, h, 0), pass->k->t, keys_t);
    pack_shares(shape, row_of(pass->v, b, h, 0), pass->v->t, values_t);
    pack(s, d, row_of(pass->k, b, h, 0), pass->k->t, pass->scale, keys);
    size begun = 0; /* keys whose gradients have begun */
    for (size i = 0, i_stop; i < shape->queries; i = i_stop) {
        i_stop = query_border(shape, i);
        const size seen_keys = visible(shape, i_stop);
        const float *k_panels = keys_t, *v_panels = values_t;
        size j = 0;
        for (size stop; j < seen_keys; j = stop) {
            stop = key_border(shape, j);
            backward_pair(pass, i, i_stop, j, stop, k_panels, v_panels, keys);
            deposit(pass, pass->dk, j, stop - j, pass->sum_k, j < begun);
            deposit(pass, pass->dv, j, stop - j, pass->sum_v, j < begun);
            k_panels += round_up(stop - j, PANEL) * d, v_panels += round_up(stop - j, PANEL) * d;
        }
        begun = most(begun, j);
        if (j == 0) clear(pass, pass->dq, i, i_stop);
    }
    clear(pass, pass->dk, begun, s);
    clear(pass, pass->dv, begun, s);
}

/* q (B, H, T, D), k and v (B, H, S, D) -> o, seen as (B, H, T, D), and lse (B, H, T). With sums (B, H, T) the result is
 * partial: o is not yet divided by the sums, and maxima take the place of lse. */
void EXPORT(attention_forward)(
    const struct shape *shape, const struct draw *draw, const struct matrix *q, const struct matrix *k,
    const struct matrix *v, const struct matrix *o, float scale, float *lse, float *sums, float *work) {
    for (size b = 0; b < shape->batch; b++)
        for (size h = 0; h < shape->heads; h++)
            forward_head(shape, draw, b, h, q, k, v, o, scale, lse, sums, align_line(work));
}

/* o (B, T, H, D), maxima and sums (B, H, T) = they and others, whose keys come behind theirs. */
void EXPORT(attention_merge)(
    const struct shape *shape, const struct matrix *o, float *tops, float *sums, const struct matrix *other,
    const float *other_tops, const float *other_sums) {
    size at = 0;
    for (size b = 0; b < shape->batch; b++)
        for (size h = 0; h < shape->heads; h++)
            for (size t = 0; t < shape->queries; t++, at++)
                merge_row(
                    shape->width, tops + at, sums + at, row_of(o, b, h, t), other_tops[at], other_sums[at],
                    row_of(other, b, h, t));
}

/* o divided by the sums, and lse, of a result that is no longer partial. */
void EXPORT(attention_finish)(
    const struct shape *shape, const struct matrix *o, const float *tops, const float *sums, float *lse) {
    size at = 0;
    for (size b = 0; b < shape->batch; b++)
        for (size h = 0; h < shape->heads; h++)
            for (size t = 0; t < shape->queries; t++, at++)
                lse[at] = finish_row(shape->width, row_of(o, b, h, t), tops[at], sums[at], row_of(o, b, h, t));
}

void EXPORT(attention_backward)(
    const struct shape *shape, const struct draw *draw, const struct matrix *dout, const struct matrix *q,
    const struct matrix *k, const struct matrix *v, const struct matrix *o, const struct matrix *dq,
    const struct matrix *dk, const struct matrix *dv, float scale, const float *lse, float *work) {
    struct pass pass = {shape, draw, 0, 0, dout, q, k, v, o, dq, dk, dv, scale, lse, 0, 0, 0, 0, 0, 0, 0, 0};
    for (pass.b = 0; pass.b < shape->batch; pass.b++)
        for (pass.h = 0; pass.h < shape->heads; pass.h++) backward_head(&pass, align_line(work));
}
#undef QUERIES
#undef KEYS
#undef LINE
