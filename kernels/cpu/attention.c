/* Attention in tiles of QUERIES x KEYS; a tile of scores lives in L2 and no (T, S) matrix exists.
 * Scores are computed by register tiles, and those wholly above the diagonal are skipped.
 * Source: Dao et al., FlashAttention, arXiv:2205.14135.
 *
 * The order of additions. Positions are absolute, and shares end at the multiples of shape.share; tiles begin anew
 * there. The softmax over the keys of a share is computed by itself, and the partial results (maximum, sum, values not
 * yet divided by it) are merged in ascending order: merge_row. The gradient of a query is a sum for every share of keys,
 * that of a key a sum for every share of queries, and these are added in ascending order. So every pair of shares may
 * be computed elsewhere, as in a ring of ranks. A pair in which nothing is seen contributes nothing, not even zeros.
 *
 * Query heads come in groups that share keys and values, which are packed once for all of them. In a pair of shares the
 * gradient of a key is one chain over the heads of a group, and over the tiles of queries of a head.
 *
 * Keys before the first that a query sees are hidden as those above the diagonal are. Where tiles begin follows
 * positions alone; whole tiles, register tiles and parts of chains that are hidden are left out, which changes no bit of
 * a sum: there a weight would be 0. */
#include "tiles.h"

#ifndef QUERIES
#define QUERIES 48
#endif
#ifndef KEYS
#define KEYS 256
#endif
#define LINE (KEYS + 16) /* floats between rows of a tile: not a power of two, so that columns spread over L1 */

struct matrix {
    void *data;      /* elements, or floats where it is a partial result or a sum */
    size b, g, h, t; /* strides in these; the last dim is contiguous */
};

struct shape {
    size batch, groups, heads, queries, keys, width; /* heads of a group */
    size query, key, share; /* positions of the first query and of the first key; positions in a share */
    const int32_t *starts;  /* position of the first key that a query sees, never descending; or null */
    size starts_b;          /* from one row of the batch to the next */
    int causal;
};

struct head {
    size b, g, h; /* head h of group g */
};

INLINE element *row_of(const struct matrix *m, struct head at, size t) {
    return (element *)m->data + at.b * m->b + at.g * m->g + at.h * m->h + t * m->t;
}

INLINE float *floats_of(const struct matrix *m, struct head at, size t) {
    return (float *)m->data + at.b * m->b + at.g * m->g + at.h * m->h + t * m->t;
}

/* The number of a head's first query among those of all heads. */
INLINE size first_of(const struct shape *shape, struct head at) {
    return ((at.b * shape->groups + at.g) * shape->heads + at.h) * shape->queries;
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

/* How many keys are hidden before the first that query i sees, and so from the queries behind it. */
INLINE size hidden(const struct shape *shape, size b, size i) {
    return shape->starts ? most(0, shape->starts[b * shape->starts_b + i] - shape->key) : 0;
}

/* A tile of scores, of queries and keys. Row r sees of its keys those before first + r, and none before starts[r] - origin. */
struct scores {
    size rows, keys, first, origin;
    const int32_t *starts;
};

INLINE struct scores scores_of(const struct shape *shape, size b, size i, size rows, size j, size keys) {
    const size first = shape->causal ? shape->query + i + 1 - shape->key - j : shape->keys; /* that many: all */
    const int32_t *starts = shape->starts ? shape->starts + b * shape->starts_b + i : 0;
    return (struct scores){rows, keys, first, shape->key + j, starts};
}

/* Row r of a tile sees its keys low(r) ... high(r) - 1, if there are any. */
INLINE size high(const struct scores *tile, size r) { return most(0, least(tile->keys, tile->first + r)); }

INLINE size low(const struct scores *tile, size r) {
    return tile->starts ? most(0, least(tile->keys, tile->starts[r] - tile->origin)) : 0;
}

/* Rows before `from` may see keys before k, those from there on do not: for ascending k, where `from` was before. */
INLINE size rows_before(const struct scores *tile, size k, size from) {
    if (!tile->starts) return tile->rows;
    while (from < tile->rows && tile->starts[from] - tile->origin < k) from++;
    return from;
}

/* Tiles of queries that stay packed: those of a share that meets several shares of keys. */
static size tiles_kept(const struct shape *shape) {
    if (key_border(shape, 0) == shape->keys) return 1;
    return (least(shape->share, shape->queries) + QUERIES - 1) / QUERIES;
}

/* Floats for gradients of a group, complete before they become elements, and for a tile of queries and its do. */
static size floats_between(const struct shape *shape) {
    if (IS_FLOAT) return 0;
    return (shape->heads * shape->queries + 2 * shape->keys + 2 * QUERIES) * shape->width;
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
           tiles_kept(shape) * shape->heads * QUERIES * (2 * wide + 1) + 2 * QUERIES * LINE + 16 +
           floats_between(shape);
}

INLINE float *take(float **work, size floats) {
    float *start = *work;
    *work += floats;
    return start;
}

/* s (rows, keys) = a (rows, d) times packed transposed keys; register tiles that no row sees are left out. */
static void tile_scores(const struct scores *tile, size d, const float *a, size ra, const float *bt, float *s) {
    for (size j = 0, stop = 0; j < tile->keys; j += PANEL, bt += d * PANEL) {
        stop = rows_before(tile, j + PANEL, stop);
        for (size r = most(0, j - tile->first + 1) / ROWS * ROWS; r < stop; r += ROWS)
            multiply(least(ROWS, stop - r), d, a + r * ra, ra, 1, bt, s + r * LINE + j, LINE, 0);
    }
}

/* out (rows, d) += p (rows, keys) times packed b (keys of `all`, d). */
static void tile_product(const struct scores *tile, size d, const float *p, const float *b, size all, float *out) {
    for (size j = 0; j < d; j += PANEL, b += all * PANEL)
        for (size r = 0; r < tile->rows; r += ROWS) {
            const size some = least(ROWS, tile->rows - r), from = low(tile, r), n = high(tile, r + some - 1) - from;
            if (n > 0)
                multiply(
                    some, n, p + r * LINE + from, LINE, 1, b + from * PANEL, out + r * padded(d) + j, padded(d), 1);
        }
}

/* out (keys, d) += p (rows, keys) transposed times packed b (rows, d). */
static void tile_product_transposed(const struct scores *tile, size d, const float *p, const float *b, float *out) {
    for (size j = 0; j < d; j += PANEL, b += tile->rows * PANEL)
        for (size k = 0, stop = 0; k < tile->keys; k += ROWS) {
            const size from = most(0, k - tile->first + 1);
            stop = rows_before(tile, k + ROWS, stop);
            if (from < stop)
                multiply(
                    least(ROWS, tile->keys - k), stop - from, p + from * LINE + k, 1, LINE, b + from * PANEL,
                    out + k * padded(d) + j, padded(d), 1);
        }
}

static void fill(float *row, size from, size to, float value) {
    for (size i = from; i < to; i++) row[i] = value;
}

/* x (keys, d) transposed, every share in panels of its own. */
static void pack_shares(const struct shape *shape, const element *x, size stride, float *panels) {
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
    if (other_top == -__builtin_inff() && other_total == 0) return;
    if (*top == -__builtin_inff() && *total == 0) {
        *top = other_top, *total = other_total;
        memcpy(o, other_o, (size_t)d * sizeof *o);
        return;
    }
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
INLINE float finish_row(size d, const float *o, float top, float total, element *out) {
    for (size k = 0; k < d; k += W)
        store_some(out + k, d - k, total == 0 ? splat(0) : load_some(o + k, d - k, 0) / total);
    return total == 0 ? top : (float)((double)top + log_of(total));
}

/* The softmax of query rows i … over the keys j … stop - 1 of one share, whose transposed panels are `keys`. */
static void attend(
    const struct shape *shape, const struct draw *draw, struct head at, size i, size rows, size j, size stop,
    const float *q, const float *keys, const float *values, float *p, struct partial *to) {
    const size d = shape->width, wide = padded(d), start = j;
    float *top = to->top, *total = to->total, *o = to->o;
    for (size r = 0; r < rows; r++) top[r] = -__builtin_inff(), total[r] = 0;
    memset(o, 0, (size_t)(rows * wide) * sizeof *o);
    const size begin = start + most(0, hidden(shape, at.b, i) - start) / KEYS * KEYS;
    for (j = begin; j < stop; j += KEYS) {
        const struct scores tile = scores_of(shape, at.b, i, rows, j, least(KEYS, stop - j));
        tile_scores(&tile, d, q, wide, keys + (j - start) * d, p);
        for (size r = 0; r < rows; r++) {
            size from = low(&tile, r), n = high(&tile, r);
            float *row = p + r * LINE;
            if (n > from) {
                const size whole = from / LANES * LANES, full = round_up(n, LANES);
                fill(row, whole, from, -__builtin_inff());
                fill(row, n, full, -__builtin_inff());
                vf most_of[PARTS], sum[PARTS] = {{0}};
                for (int l = 0; l < PARTS; l++) most_of[l] = splat(top[r]);
                for (size k = whole; k < full; k += LANES)
                    for (int l = 0; l < PARTS; l++) most_of[l] = MAX(load(row + k + l * W), most_of[l]);
                float above = max_lanes(most_of);
                for (size k = whole; k < full; k += LANES)
                    for (int l = 0; l < PARTS; l++) {
                        vf e = vexp(load(row + k + l * W) - above);
                        sum[l] += e;
                        store(row + k + l * W, e);
                    }
                float change = j == begin ? 0.0f : vexp(splat(top[r] - above))[0];
                total[r] = total[r] * change + sum_lanes(sum);
                top[r] = above;
                if (j > begin)
                    for (size k = 0; k < wide; k += W) store(o + r * wide + k, load(o + r * wide + k) * change);
                if (draw) {
                    float factors[KEYS];
                    const uint64_t first = row_start(draw, at.b, at.g * shape->heads + at.h, i + r) + (uint64_t)j;
                    dropout_factors(draw, first + (uint64_t)from, n - from, factors + from);
                    for (size k = from; k < n; k++) row[k] *= factors[k];
                }
            } else
                n = from;
            fill(row, 0, from, 0);
            fill(row, n, tile.keys, 0);
        }
        tile_product(&tile, d, p, values + j * PANEL, shape->keys, o);
    }
}

/* With `sums` the result is partial: o is not divided, and `levels` are maxima. */
static void forward_group(
    const struct shape *shape, const struct draw *draw, struct head at, const struct matrix *mq, const struct matrix *mk,
    const struct matrix *mv, const struct matrix *mo, float scale, float *levels, float *sums, float *work) {
    const size t = shape->queries, s = shape->keys, d = shape->width, wide = padded(d);
    float *values = take(&work, packed(s, d)), *q = take(&work, QUERIES * wide), *p = take(&work, QUERIES * LINE);
    struct partial all, part;
    all.o = take(&work, QUERIES * wide), part.o = take(&work, QUERIES * wide);
    pack(s, d, row_of(mv, at, 0), mv->t, 1.0f, values);
    pack_shares(shape, row_of(mk, at, 0), mk->t, work);
    for (; at.h < shape->heads; at.h++)
        for (size i = 0, stop; i < t; i = stop) {
            stop = least(i + QUERIES, query_border(shape, i));
            const size rows = stop - i, keys = visible(shape, stop), before = hidden(shape, at.b, i);
            for (size r = 0; r < rows; r++) {
                const element *from = row_of(mq, at, i + r);
                for (size k = 0; k < d; k++) q[r * wide + k] = number(from[k]) * scale;
            }
            const float *panels = work;
            attend(shape, draw, at, i, rows, 0, least(keys, key_border(shape, 0)), q, panels, values, p, &all);
            for (size from = 0, j = key_border(shape, 0); j < keys; from = j, j = key_border(shape, j)) {
                panels += round_up(j - from, PANEL) * d;
                if (before >= key_border(shape, j)) continue;
                attend(shape, draw, at, i, rows, j, least(keys, key_border(shape, j)), q, panels, values, p, &part);
                for (size r = 0; r < rows; r++)
                    merge_row(
                        wide, all.top + r, all.total + r, all.o + r * wide, part.top[r], part.total[r], part.o + r * wide);
            }
            for (size r = 0; r < rows; r++) {
                const float *o = all.o + r * wide;
                const size row = first_of(shape, at) + i + r;
                if (sums) {
                    memcpy(floats_of(mo, at, i + r), o, (size_t)d * sizeof *o);
                    levels[row] = all.top[r], sums[row] = all.total[r];
                } else
                    levels[row] = finish_row(d, o, all.top[r], all.total[r], row_of(mo, at, i + r));
            }
        }
}

/* What the pairs of shares of a group have in common. */
struct pass {
    const struct shape *shape;
    const struct draw *draw;
    struct head at;
    const struct matrix *dout, *q, *k, *v, *o, *dq, *dk, *dv; /* of the gradients, sums */
    float scale;
    const float *lse;
    float *q_tiles, *do_tiles, *deltas; /* tiles of queries, packed; their Σ do·o */
    float *sum_k, *sum_v, *sum_q;       /* gradients of a share of keys and of a tile of queries */
    float *p, *ds;
    float *q_rows, *do_rows; /* a tile of queries as floats, if it has none */
};

static void prepare_tile(const struct pass *pass, size i, size rows, float *q, float *dot, float *delta) {
    const size d = pass->shape->width;
    for (size r = 0; r < rows; r++) {
        const element *g = row_of(pass->dout, pass->at, i + r), *o = row_of(pass->o, pass->at, i + r);
        vf sum[PARTS] = {{0}};
        for (size k = 0; k < d; k += LANES)
            for (int l = 0; l < PARTS; l++) {
                size some = most(0, d - k - l * W);
                sum[l] = FMA(load_some(g + k + l * W, some, 0), load_some(o + k + l * W, some, 0), sum[l]);
            }
        delta[r] = sum_lanes(sum);
    }
    pack(rows, d, row_of(pass->q, pass->at, i), pass->q->t, pass->scale, q);
    pack(rows, d, row_of(pass->dout, pass->at, i), pass->dout->t, 1.0f, dot);
}

/* Rows at + 0, 1, … of x are written, or added to where a share came before. */
static void deposit(const struct pass *pass, const struct matrix *x, size at, size rows, const float *sum, int add) {
    const size d = pass->shape->width, wide = padded(d);
    for (size r = 0; r < rows; r++, sum += wide) {
        float *to = floats_of(x, pass->at, at + r);
        if (add)
            for (size k = 0; k < d; k++) to[k] += sum[k];
        else
            memcpy(to, sum, (size_t)d * sizeof *to);
    }
}

static void clear(const struct pass *pass, const struct matrix *x, size from, size to) {
    for (size r = from; r < to; r++) memset(floats_of(x, pass->at, r), 0, (size_t)pass->shape->width * sizeof(float));
}

/* Rows of floats, `stride` apart. */
struct rows {
    const float *x;
    size stride;
};

INLINE struct rows rows_of(const struct pass *pass, const struct matrix *x, size i, size rows, float *room) {
    const size d = pass->shape->width;
    if (IS_FLOAT) return (struct rows){floats_of(x, pass->at, i), x->t};
    for (size r = 0; r < rows; r++) widened(d, row_of(x, pass->at, i + r), room + r * d);
    return (struct rows){room, d};
}

/* Weights of a tile in p, and the gradient of its scores in ds: from scores, and from do·v. */
static void tile_gradient(const struct pass *pass, const struct scores *tile, size i, size j, const float *delta) {
    const struct draw *draw = pass->draw;
    const size head = pass->at.g * pass->shape->heads + pass->at.h;
    const float scale = pass->scale, *lse = pass->lse + first_of(pass->shape, pass->at) + i;
    for (size r = 0; r < tile->rows; r++) {
        const size from = low(tile, r), n = most(from, high(tile, r)), whole = from / W * W;
        float *row = pass->p + r * LINE, *slope = pass->ds + r * LINE, factors[KEYS + LANES];
        if (draw && n > from)
            dropout_factors(
                draw, row_start(draw, pass->at.b, head, i + r) + (uint64_t)(j + whole), n - whole, factors + whole);
        for (size k = n > from ? whole : n; k < n; k += W) { /* a tile has room for the whole last vector */
            vf e = vexp(FMA(load(row + k), splat(scale), splat(-lse[r])));
            vf g = load(slope + k), factor = draw ? load(factors + k) : splat(1);
            store(row + k, e * factor);
            store(slope + k, FMA(g, factor, splat(-delta[r])) * e);
        }
        fill(row, 0, from, 0), fill(row, n, tile->keys, 0);
        fill(slope, 0, from, 0), fill(slope, n, tile->keys, 0);
    }
}

/* The first key that a tile of queries sees, and how many keys lie before the last. */
struct span {
    size from, stop;
};

INLINE struct span span_of(const struct shape *shape, size b, size i, size rows) {
    return (struct span){hidden(shape, b, i), visible(shape, i + rows)};
}

/* Queries i … i_stop - 1 and keys j … j_stop - 1, a share each; the panels of the keys are those of the share. */
static void backward_pair(
    struct pass *pass, size first, size i_stop, size start, size j_stop, const float *keys_t, const float *values_t,
    const float *keys) {
    const struct shape *shape = pass->shape;
    const size d = shape->width, wide = padded(d), kept = tiles_kept(shape);
    memset(pass->sum_k, 0, (size_t)((j_stop - start) * wide) * sizeof(float));
    memset(pass->sum_v, 0, (size_t)((j_stop - start) * wide) * sizeof(float));
    for (pass->at.h = 0; pass->at.h < shape->heads; pass->at.h++)
        for (size i = first, number = 0; i < i_stop; i += QUERIES, number++) {
            const size rows = least(QUERIES, i_stop - i), slot = pass->at.h * kept + number % kept;
            const struct span sees = span_of(shape, pass->at.b, i, rows);
            const size stop = least(j_stop, sees.stop);
            if (sees.from >= stop || start >= stop) continue;
            float *q = pass->q_tiles + slot * QUERIES * wide, *dot = pass->do_tiles + slot * QUERIES * wide;
            float *delta = pass->deltas + slot * QUERIES;
            if (sees.from >= start) prepare_tile(pass, i, rows, q, dot, delta);
            const struct rows q_rows = rows_of(pass, pass->q, i, rows, pass->q_rows);
            const struct rows do_rows = rows_of(pass, pass->dout, i, rows, pass->do_rows);
            memset(pass->sum_q, 0, (size_t)(rows * wide) * sizeof(float));
            for (size j = start + most(0, sees.from - start) / KEYS * KEYS; j < stop; j += KEYS) {
                const struct scores tile = scores_of(shape, pass->at.b, i, rows, j, least(KEYS, stop - j));
                const size at = j - start;
                tile_scores(&tile, d, q_rows.x, q_rows.stride, keys_t + at * d, pass->p);
                tile_scores(&tile, d, do_rows.x, do_rows.stride, values_t + at * d, pass->ds);
                tile_gradient(pass, &tile, i, j, delta);
                tile_product(&tile, d, pass->ds, keys + j * PANEL, shape->keys, pass->sum_q);
                tile_product_transposed(&tile, d, pass->p, dot, pass->sum_v + at * wide);
                tile_product_transposed(&tile, d, pass->ds, q, pass->sum_k + at * wide);
            }
            deposit(pass, pass->dq, i, rows, pass->sum_q, sees.from < start);
        }
    pass->at.h = 0;
}

/* Gradients of queries that see nothing. */
static void clear_blind(struct pass *pass, size first, size i_stop) {
    for (size i = first; i < i_stop; i += QUERIES) {
        const size rows = least(QUERIES, i_stop - i);
        const struct span sees = span_of(pass->shape, pass->at.b, i, rows);
        if (sees.from < sees.stop) continue;
        for (pass->at.h = 0; pass->at.h < pass->shape->heads; pass->at.h++) clear(pass, pass->dq, i, i + rows);
        pass->at.h = 0;
    }
}

static void sum_group(struct pass *pass, float *work) {
    const struct shape *shape = pass->shape;
    const size s = shape->keys, d = shape->width, wide = padded(d), share = least(shape->share, s);
    const size kept = tiles_kept(shape) * shape->heads * QUERIES;
    float *keys = take(&work, packed(s, d));
    pass->sum_k = take(&work, share * wide), pass->sum_v = take(&work, share * wide);
    pass->sum_q = take(&work, QUERIES * wide);
    pass->q_tiles = take(&work, kept * wide), pass->do_tiles = take(&work, kept * wide);
    pass->p = take(&work, QUERIES * LINE), pass->ds = take(&work, QUERIES * LINE);
    pass->deltas = take(&work, kept);
    size panels = 0;
    for (size j = 0, stop; j < s; j = stop) stop = key_border(shape, j), panels += round_up(stop - j, PANEL);
    float *keys_t = take(&work, panels * d), *values_t = take(&work, panels * d);
    pack_shares(shape, row_of(pass->k, pass->at, 0), pass->k->t, keys_t);
    pack_shares(shape, row_of(pass->v, pass->at, 0), pass->v->t, values_t);
    pack(s, d, row_of(pass->k, pass->at, 0), pass->k->t, pass->scale, keys);
    size begun = 0; /* keys whose gradients have begun */
    for (size i = 0, i_stop; i < shape->queries; i = i_stop) {
        i_stop = query_border(shape, i);
        const struct span sees = span_of(shape, pass->at.b, i, i_stop - i);
        const float *k_panels = keys_t, *v_panels = values_t;
        clear_blind(pass, i, i_stop);
        for (size j = 0, stop; j < sees.stop; j = stop) {
            stop = key_border(shape, j);
            if (sees.from < least(stop, sees.stop)) {
                clear(pass, pass->dk, begun, j), clear(pass, pass->dv, begun, j);
                backward_pair(pass, i, i_stop, j, stop, k_panels, v_panels, keys);
                deposit(pass, pass->dk, j, stop - j, pass->sum_k, j < begun);
                deposit(pass, pass->dv, j, stop - j, pass->sum_v, j < begun);
                begun = most(begun, stop);
            }
            k_panels += round_up(stop - j, PANEL) * d, v_panels += round_up(stop - j, PANEL) * d;
        }
    }
    clear(pass, pass->dk, begun, s);
    clear(pass, pass->dv, begun, s);
}

/* Sums that are complete become the elements of a group's gradient. */
static void round_rows(struct pass *pass, const struct matrix *sums, size heads, size rows, const struct matrix *to) {
    for (pass->at.h = 0; pass->at.h < heads; pass->at.h++)
        for (size t = 0; t < rows; t++)
            give_back(pass->shape->width, floats_of(sums, pass->at, t), row_of(to, pass->at, t));
    pass->at.h = 0;
}

static void backward_group(struct pass *pass, float *work) {
    if (IS_FLOAT) {
        sum_group(pass, work);
        return;
    }
    const struct shape *shape = pass->shape;
    const size d = shape->width, t = shape->queries, s = shape->keys;
    const struct matrix *dq = pass->dq, *dk = pass->dk, *dv = pass->dv;
    pass->q_rows = take(&work, QUERIES * d), pass->do_rows = take(&work, QUERIES * d);
    const struct matrix sums_q = {take(&work, shape->heads * t * d), 0, 0, t * d, d};
    const struct matrix sums_k = {take(&work, s * d), 0, 0, 0, d}, sums_v = {take(&work, s * d), 0, 0, 0, d};
    pass->dq = &sums_q, pass->dk = &sums_k, pass->dv = &sums_v;
    sum_group(pass, work);
    round_rows(pass, &sums_q, shape->heads, t, dq);
    round_rows(pass, &sums_k, 1, s, dk), round_rows(pass, &sums_v, 1, s, dv);
    pass->dq = dq, pass->dk = dk, pass->dv = dv;
}

/* q (B, G, heads, T, D), k and v (B, G, S, D) -> o, seen as q, and lse (B, H, T). With sums (B, H, T) the result is
 * partial: o is not yet divided by the sums, and maxima take the place of lse. */
void EXPORT(attention_forward)(
    const struct shape *shape, const struct draw *draw, const struct matrix *q, const struct matrix *k,
    const struct matrix *v, const struct matrix *o, float scale, float *lse, float *sums, float *work) {
    for (struct head at = {0, 0, 0}; at.b < shape->batch; at.b++)
        for (at.g = 0; at.g < shape->groups; at.g++)
            forward_group(shape, draw, at, q, k, v, o, scale, lse, sums, align_line(work));
}

#ifndef ELEMENT
/* o (B, T, H, D), maxima and sums (B, H, T) = they and others, whose keys come behind theirs. Every head is a group. */
void EXPORT(attention_merge)(
    const struct shape *shape, const struct matrix *o, float *tops, float *sums, const struct matrix *other,
    const float *other_tops, const float *other_sums) {
    size row = 0;
    for (struct head at = {0, 0, 0}; at.b < shape->batch; at.b++)
        for (at.g = 0; at.g < shape->groups; at.g++)
            for (size t = 0; t < shape->queries; t++, row++)
                merge_row(
                    shape->width, tops + row, sums + row, row_of(o, at, t), other_tops[row], other_sums[row],
                    row_of(other, at, t));
}

/* o divided by the sums, and lse, of a result that is no longer partial. */
void EXPORT(attention_finish)(
    const struct shape *shape, const struct matrix *o, const float *tops, const float *sums, float *lse) {
    size row = 0;
    for (struct head at = {0, 0, 0}; at.b < shape->batch; at.b++)
        for (at.g = 0; at.g < shape->groups; at.g++)
            for (size t = 0; t < shape->queries; t++, row++)
                lse[row] = finish_row(shape->width, row_of(o, at, t), tops[row], sums[row], row_of(o, at, t));
}
#endif

void EXPORT(attention_backward)(
    const struct shape *shape, const struct draw *draw, const struct matrix *dout, const struct matrix *q,
    const struct matrix *k, const struct matrix *v, const struct matrix *o, const struct matrix *dq,
    const struct matrix *dk, const struct matrix *dv, float scale, const float *lse, float *work) {
    struct pass pass = {shape, draw, {0, 0, 0}, dout, q, k, v, o, dq, dk, dv, scale, lse, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    for (pass.at.b = 0; pass.at.b < shape->batch; pass.at.b++)
        for (pass.at.g = 0; pass.at.g < shape->groups; pass.at.g++) backward_group(&pass, align_line(work));
}
#undef QUERIES
#undef KEYS
#undef LINE
