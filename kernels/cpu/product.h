/* The blocked matrix product: c = start + a b, with operands of any strides.
 *
 * Three blocks as in GotoBLAS: a panel of b (DEPTH x PANEL) stays in L1, a band of a (BAND x DEPTH) in L2, the
 * panels of a strip (DEPTH x STRIP) in L3; both operands are packed in the order in which a tile reads them.
 * Sources: Goto, van de Geijn, "Anatomy of high-performance matrix multiplication", 2008; Van Zee, van de Geijn,
 * "BLIS", 2015. Sizes were measured on Zen 3 (LOG.md); the tile for AVX-512, 12 x 32, is that of BLIS, unmeasured.
 *
 * The order of additions is that of this text: for each DEPTH of k a chain of multiply-adds over ascending k that
 * starts at zero; the chains are added, in order, to start = (bias + base), or to zero. Tiles, bands, strips and
 * the other rows do not enter, so that every level with a fused multiply-add gives the same bits, on any number of
 * threads. c overlaps neither a nor b. */
#if W == 16 || defined(__aarch64__)
#define TALL 12 /* rows of a tile: 24 vectors of sums in 32 registers */
#else
#define TALL 6 /* 12 in 16 */
#endif
#define DEPTH 384
#define BAND 96
#define STRIP 2048
#define SPELL 16 /* steps from one prefetch to the next: 24 of them in a whole DEPTH */
#define LATE 96  /* so many steps before the end c is fetched: earlier, the panel drives it out of L1 again */

typedef float quad __attribute__((vector_size(16)));
typedef quad quad_any __attribute__((aligned(4), may_alias));
#if defined(__clang__)
#define PICK_FOUR(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else /* gcc has that name only since 12 */
typedef int32_t four __attribute__((vector_size(16)));
#define PICK_FOUR(a, b, ...) __builtin_shuffle(a, b, (four){__VA_ARGS__})
#endif

struct plane {
    float *x;
    size row, column; /* strides in floats */
};

/* What a product starts from; bias (n) and base (m, n) may be absent. c has column stride 1, as has base. */
struct product {
    size m, n, k;
    struct plane a, b, c, base;
    const float *bias;
};

INLINE const float *at(const struct plane *p, size row, size column) { return p->x + row * p->row + column * p->column; }

/* ---- packing: strips of `width` lanes, element (i, lane) of a strip at i * width + lane, missing lanes zero ---- */

/* Four lanes of four steps turned round. */
INLINE void turn(const float *from, size lane, const int width, float *to) {
    quad a = *(const quad_any *)from, b = *(const quad_any *)(from + lane);
    quad c = *(const quad_any *)(from + 2 * lane), d = *(const quad_any *)(from + 3 * lane);
    quad ab = PICK_FOUR(a, b, 0, 4, 1, 5), cd = PICK_FOUR(c, d, 0, 4, 1, 5);
    *(quad_any *)to = PICK_FOUR(ab, cd, 0, 1, 4, 5);
    *(quad_any *)(to + width) = PICK_FOUR(ab, cd, 2, 3, 6, 7);
    ab = PICK_FOUR(a, b, 2, 6, 3, 7), cd = PICK_FOUR(c, d, 2, 6, 3, 7);
    *(quad_any *)(to + 2 * width) = PICK_FOUR(ab, cd, 0, 1, 4, 5);
    *(quad_any *)(to + 3 * width) = PICK_FOUR(ab, cd, 2, 3, 6, 7);
}

/* Two lanes of four steps: what six lanes leave over. */
INLINE void turn_pair(const float *from, size lane, const int width, float *to) {
    quad a = *(const quad_any *)from, b = *(const quad_any *)(from + lane);
    quad low = PICK_FOUR(a, b, 0, 4, 1, 5), high = PICK_FOUR(a, b, 2, 6, 3, 7);
    memcpy(to, &low, 8);
    memcpy(to + width, (float *)&low + 2, 8);
    memcpy(to + 2 * width, &high, 8);
    memcpy(to + 3 * width, (float *)&high + 2, 8);
}

INLINE void gather(size steps, size lanes, const float *from, size step, size lane, const int width, float *to) {
    for (size i = 0; i < steps; i++)
        for (size j = 0; j < lanes; j++) to[i * width + j] = from[i * step + j * lane];
}

/* A whole strip whose steps lie one behind the other. */
INLINE void turn_strip(size steps, const float *from, size lane, const int width, float *to) {
    const size whole = steps - steps % 4;
    for (int j = 0; j + 2 <= width; j += j + 4 <= width ? 4 : 2)
        for (size i = 0; i < whole; i += 4) {
            __builtin_prefetch(from + (width + j + i / 4 % 4) * lane + i); /* the next strip, in 16 steps all its lines */
            if (j + 4 <= width)
                turn(from + j * lane + i, lane, width, to + i * width + j);
            else
                turn_pair(from + j * lane + i, lane, width, to + i * width + j);
        }
    gather(steps - whole, width, from + whole, 1, lane, width, to + whole * width);
}

INLINE void pack_strips(size steps, size lanes, const float *from, size step, size lane, const int width, float *to) {
    const size whole = lanes - lanes % width;
    if (lane == 1) /* a step of all strips at once: it lies in one piece, and steps may be far apart */
        for (size i = 0; i < steps; i++)
            for (size j = 0; j < whole; j += width) {
                float *strip = to + j * steps + i * width;
                __builtin_prefetch(strip + 24, 1); /* its next line: stores that miss L1 wait for one another */
                memcpy(strip, from + i * step + j, (size_t)width * sizeof *to);
            }
    else
        for (size j = 0; j < whole; j += width)
            if (step == 1)
                turn_strip(steps, from + j * lane, lane, width, to + j * steps);
            else
                gather(steps, width, from + j * lane, step, lane, width, to + j * steps);
    if (whole < lanes) {
        memset(to + whole * steps, 0, (size_t)(steps * width) * sizeof *to);
        gather(steps, lanes - whole, from + whole * lane, step, lane, width, to + whole * steps);
    }
}

/* ---- the tile -------------------------------------------------------------------------------------------------- */

/* Memory that is wanted soon: one line every SPELL steps. */
struct ahead {
    const float *line;
    size step;
};

INLINE vf spread(const float *p) {
    int32_t bits;
    memcpy(&bits, p, sizeof bits);
    return (vf)(bits - (vi){0});
}

/* c + a b: a word is a float, or a pair of bf16 of two steps. */
INLINE vf multiply_add(const int pairs, vf a, vf b, vf c) { return pairs ? dot2(c, (vi)a, (vi)b) : FMA(a, b, c); }

INLINE void accumulate(const int pairs, vf sum[TALL][2], size words, const float *a, const float *b) {
#pragma GCC unroll 4
    for (size i = 0; i < words; i++, a += TALL, b += PANEL) {
        vf b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 12
        for (int r = 0; r < TALL; r++) {
            vf x = spread(a + r);
            sum[r][0] = multiply_add(pairs, x, b0, sum[r][0]);
            sum[r][1] = multiply_add(pairs, x, b1, sum[r][1]);
        }
    }
}

/* c (TALL, PANEL) = bias + base + a b, of packed a (words, TALL) and b (words, PANEL); base may be absent. */
INLINE void tile_of(
    const int pairs, size words, const float *a, const float *b, struct ahead ahead, const float *bias,
    const float *base, size base_row, float *c, size row) {
    vf sum[TALL][2];
#pragma GCC unroll 12
    for (int r = 0; r < TALL; r++) sum[r][0] = sum[r][1] = splat(0);
    const size whole = words - words % SPELL, late = most(0, whole - LATE);
    for (size i = 0; i < whole; i += SPELL, ahead.line += ahead.step) {
        __builtin_prefetch(ahead.line, 0, 2);
        if (i == late)
            for (int r = 0; r < TALL; r++) {
                __builtin_prefetch(c + r * row, 1);
                __builtin_prefetch(c + r * row + PANEL - 1, 1);
            }
        accumulate(pairs, sum, SPELL, a + i * TALL, b + i * PANEL);
    }
    accumulate(pairs, sum, words - whole, a + whole * TALL, b + whole * PANEL);
    const vf bias0 = load(bias), bias1 = load(bias + W);
#pragma GCC unroll 12
    for (int r = 0; r < TALL; r++, c += row) {
        vf start0 = bias0, start1 = bias1;
        if (base) {
            start0 += load(base + r * base_row);
            start1 += load(base + r * base_row + W);
        }
        store(c, start0 + sum[r][0]);
        store(c + W, start1 + sum[r][1]);
    }
}

static __attribute__((noinline)) void float_tile(
    size words, const float *a, const float *b, struct ahead ahead, const float *bias, const float *base,
    size base_row, float *c, size row) {
    tile_of(0, words, a, b, ahead, bias, base, base_row, c, row);
}

static __attribute__((noinline)) void bf16_tile(
    size words, const float *a, const float *b, struct ahead ahead, const float *bias, const float *base,
    size base_row, float *c, size row) {
    tile_of(1, words, a, b, ahead, bias, base, base_row, c, row);
}

/* ---- blocks ---------------------------------------------------------------------------------------------------- */

/* What turn `turn` of tiles fetches of a block at `from`: one of its rows where steps lie one behind the other,
 * else SPELLS steps of one line. Sixteen turns fetch the next panel of b, BAND turns the next band of a. */
INLINE struct ahead lines(const float *from, size step, size lane, size turn) {
    enum { SPELLS = DEPTH / SPELL, FLOATS = 16 };
    if (step == 1) return (struct ahead){from + turn * lane, FLOATS};
    return (struct ahead){from + turn % FLOATS * SPELLS * step + turn / FLOATS * FLOATS + FLOATS - 1, step};
}

/* A block of the product at (i, j), after the steps before k. */
struct block {
    size i, j, k, rows, columns, steps;
};

/* The part of c that a block is, and what it starts from: the bias, and base or what earlier steps have left in c. */
struct start {
    float *c;
    const float *bias, *base;
    size base_row;
};

INLINE struct start start_of(const struct product *p, const struct block *b) {
    const struct plane *base = b->k ? &p->c : &p->base;
    return (struct start){
        p->c.x + b->i * p->c.row + b->j, p->bias && b->k == 0 ? p->bias + b->j : 0,
        base->x ? base->x + b->i * base->row + b->j : 0, base->row};
}

/* A tile, whole or at an edge, where the sums go to a whole one first. */
INLINE void put_tile(
    const int pairs, const struct product *p, const struct block *b, const float *left, const float *right,
    struct ahead ahead) {
    static const float zeros[PANEL];
    const size words = pairs ? (b->steps + 1) / 2 : b->steps;
    const struct start start = start_of(p, b);
    float edge[TALL * PANEL];
    if (b->rows == TALL && b->columns == PANEL) {
        const float *bias = start.bias ? start.bias : zeros;
        (pairs ? bf16_tile : float_tile)(
            words, left, right, ahead, bias, start.base, start.base_row, start.c, p->c.row);
    } else {
        (pairs ? bf16_tile : float_tile)(words, left, right, ahead, zeros, 0, 0, edge, PANEL);
        for (size r = 0; r < b->rows; r++)
            for (size j = 0; j < b->columns; j++) {
                float first = start.bias ? start.bias[j] : 0.0f;
                if (start.base) first += start.base[r * start.base_row + j];
                start.c[r * p->c.row + j] = first + edge[r * PANEL + j];
            }
    }
}

INLINE void pack_words(
    const int pairs, size steps, size lanes, const float *from, size step, size lane, const int width, float *to) {
    pack_strips(steps, lanes, from, step, lane, width, to);
    for (size j = 0; pairs && j < lanes; j += width) pair_steps(steps, width, to + j * steps);
}

/* Columns of b that are packed at a time: all of a strip, or, where one band of a is all there is, one panel, which is
 * used at once and gives way to the next. */
static size packed_columns(size m, size n) { return m <= BAND ? PANEL : round_up(least(n, STRIP), PANEL); }

/* Floats of work space. */
static size product_work(size m, size n, size k) {
    return 16 + least(k, DEPTH) * (packed_columns(m, n) + round_up(least(m, BAND), TALL));
}

/* What a band of a, from row i, adds to a strip of c, from column j, by the steps from k. Its first band packs b. */
INLINE void multiply_band(
    const int pairs, const struct product *p, size i, size j, size k, float *panels, float *band) {
    const struct plane *a = &p->a, *b = &p->b;
    const size steps = least(DEPTH, p->k - k), rows = least(BAND, p->m - i), columns = least(STRIP, p->n - j);
    pack_words(pairs, steps, rows, at(a, i, k), a->column, a->row, TALL, band);
    size turn = 0;
    for (size across = 0; across < columns; across += PANEL) {
        const size wide = least(PANEL, columns - across), column = j + across;
        float *panel = p->m <= BAND ? panels : panels + across * steps;
        if (i == 0) pack_words(pairs, steps, wide, at(b, k, column), b->row, b->column, PANEL, panel);
        for (size down = 0; down < rows; down += TALL, turn++) {
            const struct block block = {i + down, column, k, least(TALL, rows - down), wide, steps};
            const struct ahead ahead = i == 0
                ? lines(at(b, k, column + PANEL), b->row, b->column, down / TALL)
                : lines(at(a, i + BAND, k), a->column, a->row, least(turn, BAND - 1));
            put_tile(pairs, p, &block, band + down * steps, panel, ahead);
        }
    }
}

INLINE void product(const int pairs, const struct product *p, float *work) {
    float *panels = align_line(work), *band = panels + least(p->k, DEPTH) * packed_columns(p->m, p->n);
    for (size j = 0; j < p->n; j += STRIP)
        for (size k = 0; k < p->k; k += DEPTH)
            for (size i = 0; i < p->m; i += BAND) multiply_band(pairs, p, i, j, k, panels, band);
}
