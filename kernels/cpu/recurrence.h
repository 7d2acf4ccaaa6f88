/* What a recurrent layer multiplies at every time step: a few rows by a matrix u that stays packed for all of them.
 *
 * A product of so few rows takes as long as it takes to bring u; packed once, its panels lie in the order in which they
 * are read, T times over. A tile is as tall as there are rows, up to TALL, and reads them where they are. The order of
 * additions is that of product.h where c is complete: a share is summed for each DEPTH of it by a chain of multiply-adds
 * over ascending steps from zero, chains are added in order, and a tree joins the shares. Products are of float32
 * whatever elements are, as those inside attention: states go from step to step as floats. */
struct recurrence {
    size batch, length, width, gates, shares; /* shares: of the sum over gates x units in backward */
    const element *u;                         /* (width, gates, width) */
    const int32_t *starts;                    /* (batch, length), the first position of each one's document, or absent */
};

/* The order of k steps: `shares` shares, each of `segments` runs. */
struct walk {
    size shares, segments, run;
};

INLINE size walk_place(const struct walk *w, size step) {
    const size part = step / w->run;
    return (part % w->segments * w->shares + part / w->segments) * w->run + step % w->run;
}

/* The chain of `steps` steps from `first` on, of a tile of rows; it is put or added to `to` (tall, PANEL). */
INLINE void chain_of(
    const int tall, const struct walk *w, size first, size steps, const float *const *rows, const float *panel, int add,
    float *to) {
    vf sum[TALL][2];
#pragma GCC unroll 12
    for (int r = 0; r < tall; r++) sum[r][0] = sum[r][1] = splat(0);
    const float *b = panel + first * PANEL;
    for (size done = 0, some; done < steps; done += some) {
        const size from = walk_place(w, first + done);
        some = least(steps - done, w->run - (first + done) % w->run);
        const float *a[TALL];
        for (int r = 0; r < tall; r++) a[r] = rows[r] + from;
        for (size i = 0; i < some; i++, b += PANEL) {
            vf b0 = load(b), b1 = load(b + W);
            __builtin_prefetch(b + 16 * PANEL);
#pragma GCC unroll 12
            for (int r = 0; r < tall; r++) {
                vf x = spread(a[r] + i);
                sum[r][0] = FMA(x, b0, sum[r][0]);
                sum[r][1] = FMA(x, b1, sum[r][1]);
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < tall; r++, to += PANEL) {
        store(to, (add ? load(to) : splat(0)) + sum[r][0]);
        store(to + W, (add ? load(to + W) : splat(0)) + sum[r][1]);
    }
}

static void chain_of_rows(
    int tall, const struct walk *w, size first, size steps, const float *const *rows, const float *panel, int add,
    float *to) {
#define TALL_CASE(n) \
    case n: chain_of(n <= TALL ? n : TALL, w, first, steps, rows, panel, add, to); break;
    switch (tall) {
        TALL_CASE(1) TALL_CASE(2) TALL_CASE(3) TALL_CASE(4) TALL_CASE(5) TALL_CASE(6)
#if TALL == 12
        TALL_CASE(7) TALL_CASE(8) TALL_CASE(9) TALL_CASE(10) TALL_CASE(11) TALL_CASE(12)
#endif
    }
#undef TALL_CASE
}

/* planes (batch, PANEL) = the product of rows and a packed panel; `planes` has room for HALVINGS + 1 of them. */
static void panel_of(const struct walk *w, size batch, const float *const *rows, const float *panel, float *planes) {
    const size share = w->segments * w->run, plane = batch * PANEL, tiles = (batch + TALL - 1) / TALL;
    float *to = planes;
    for (size g = 0; g < w->shares; g++, to += plane) {
        for (size done = 0; done < share; done += DEPTH)
            for (size t = 0; t < tiles; t++) {
                const size from = batch * t / tiles, tall = batch * (t + 1) / tiles - from;
                chain_of_rows(
                    (int)tall, w, g * share + done, least(DEPTH, share - done), rows + from, panel, done > 0,
                    to + from * PANEL);
            }
        for (int more = joins(g, w->shares); more; more--, to -= plane)
            for (size i = 0; i < plane; i += W) store(to - plane + i, load(to - plane + i) + load(to + i));
    }
}

/* ---- work space ---- */

struct desk {
    float *packed;        /* u, in panels */
    float *planes;        /* of sums of shares */
    float *sums, *given;  /* (batch, row) each: a product's result, and its left factor where it lies nowhere else */
    const float **rows;   /* of the left factor, (batch) */
    float *carried, *zeros; /* (batch, width), (width) */
    float *h, *c;           /* (batch, width) each: states that lie nowhere else as floats */
    size row;             /* gates x width in whole panels */
};

#define POINTER 2 /* floats that an address takes */

size EXPORT(recurrence_work)(const struct recurrence *r) {
    const size row = round_up(r->gates * r->width, PANEL), across = round_up(r->width, PANEL);
    return 16 + most(row, across * r->gates) * r->width + (HALVINGS + 1) * r->batch * PANEL +
        r->batch * (2 * row + POINTER + r->width) + r->width + (IS_FLOAT ? 0 : 2 * r->batch * r->width);
}

static struct desk desk_of(const struct recurrence *r, float *work) {
    const size row = round_up(r->gates * r->width, PANEL), across = round_up(r->width, PANEL);
    struct desk d = {.packed = align_line(work), .row = row};
    d.planes = d.packed + most(row, across * r->gates) * r->width;
    d.sums = d.planes + (HALVINGS + 1) * r->batch * PANEL;
    d.given = d.sums + r->batch * row;
    d.rows = (const float **)(d.given + r->batch * row);
    d.carried = (float *)d.rows + POINTER * r->batch;
    d.zeros = d.carried + r->batch * r->width;
    d.h = d.zeros + r->width, d.c = d.h + r->batch * r->width;
    memset(d.carried, 0, (size_t)((r->batch + 1) * r->width) * sizeof *d.carried);
    return d;
}

/* u as the right factor of h u. */
static struct walk pack_forward(const struct recurrence *r, float *to) {
    const size n = r->gates * r->width;
    pack_strips(r->width, n, r->u, n, 1, PANEL, r->width, to);
    return (struct walk){1, 1, r->width};
}

/* u turned round, as the right factor of d u^T. */
static struct walk pack_backward(const struct recurrence *r, float *to) {
    const size k = r->gates * r->width, run = r->width / r->shares;
    const struct walk w = {r->shares, r->gates, run};
    for (size step = 0; step < k; step += run)
        pack_strips(run, r->width, r->u + walk_place(&w, step), 1, k, PANEL, k, to + step * PANEL);
    return w;
}

/* d->sums (batch, n) = rows by the packed matrix of n columns. */
static void multiply_step(const struct recurrence *r, const struct walk *w, const struct desk *d, size n) {
    const size k = w->shares * w->segments * w->run;
    for (size j = 0; j < n; j += PANEL) {
        panel_of(w, r->batch, d->rows, d->packed + j * k, d->planes);
        for (size b = 0; b < r->batch; b++)
            memcpy(d->sums + b * d->row + j, d->planes + b * PANEL, PANEL * sizeof *d->sums);
    }
}

/* Whether position t of row b begins from nothing. */
INLINE int begins(const struct recurrence *r, size b, size t) { return r->starts && r->starts[b * r->length + t] == t; }

/* The row of what was stored of a state before position t. */
INLINE const element *
stored_before(const struct recurrence *r, const struct desk *d, const element *x, size b, size t) {
    return begins(r, b, t) || t == 0 ? (const element *)d->zeros : x + (b * r->length + t - 1) * r->width;
}

/* Where the state of row b at position t is as floats: in x (batch, length, width), or, if that has none, in `room`. */
INLINE float *state_at(const struct recurrence *r, element *x, float *room, size b, size t) {
    return IS_FLOAT ? (float *)x + (b * r->length + t) * r->width : room + b * r->width;
}

/* The state before position t: that one, that of `first` (batch, width), or zeros. */
INLINE const float *state_before(
    const struct recurrence *r, const struct desk *d, element *x, const element *first, float *room, size b, size t) {
    if (begins(r, b, t)) return d->zeros;
    if (t > 0) return state_at(r, x, room, b, t - 1);
    return first ? widened(r->width, first + b * r->width, room + b * r->width) : d->zeros;
}
