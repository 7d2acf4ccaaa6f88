/* The blocked matrix product: c = start + a b, with operands of any strides.
 *
 * Operands and the bias consist of elements, base and c of these or of floats; sums are floats, and c is rounded once.
 *
 * Three blocks as in GotoBLAS: a panel of b (DEPTH x PANEL) stays in L1, a band of a (BAND x DEPTH) in L2, the
 * panels of a strip (DEPTH x STRIP) in L3; both operands are packed in the order in which a tile reads them.
 * Sources: Goto, van de Geijn, "Anatomy of high-performance matrix multiplication", 2008; Van Zee, van de Geijn,
 * "BLIS", 2015. Sizes were measured on Zen 3 (LOG.md); the tile for AVX-512, 12 x 32, is that of BLIS, unmeasured.
 *
 * The order of additions is that of this text, for each element of c by itself. k consists of `segments` equal segments,
 * each of `shares` equal shares; share g of k is the g-th of every segment, one behind the other. A share is summed as
 * if it were all there is: for each DEPTH of it a chain of multiply-adds over ascending steps that starts at zero; the
 * chains are added in order. A tree joins the shares, a power of two: ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)).
 * start = ((0 + bias) + base). Where c is to be `complete`, start + the joined sum is c; otherwise there is one share,
 * whose chains are added to start one by one. Tiles, bands, strips, planes and the other rows do not enter, so that every
 * level with a fused multiply-add gives the same bits, on any number of threads, and who has the operands of a share has
 * its sum. c overlaps neither a nor b; where it is complete it may be base. */
#if W == 16 || defined(__aarch64__)
#define TALL 12 /* rows of a tile: 24 vectors of sums in 32 registers */
#else
#define TALL 6 /* 12 in 16 */
#endif
#define DEPTH 384
#define BAND 96
#define STRIP 2048
#define WAITING (1 << 21) /* floats of a plane of sums that wait: 8 MiB */
#define SPELL 16 /* steps from one prefetch to the next: 24 of them in a whole DEPTH */
#define LATE 96  /* so many steps before the end c is fetched: earlier, the panel drives it out of L1 again */
#define HALVINGS 6 /* of k into shares: at most 64 */

typedef float quad __attribute__((vector_size(16)));
typedef quad quad_any __attribute__((aligned(4), may_alias));
#if defined(__clang__)
#define PICK_FOUR(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else /* gcc has that name only since 12 */
typedef int32_t four __attribute__((vector_size(16)));
#define PICK_FOUR(a, b, ...) __builtin_shuffle(a, b, (four){__VA_ARGS__})
#endif

struct plane {
    void *x;
    size row, column; /* strides in elements or floats */
    size floats;      /* whether it has floats */
};

/* bias (n) and base (m, n) may be absent. c and base have column stride 1. `shares`: a power of two that, times
 * `segments`, divides k; one where c is not `complete`. `lower`: of a square c only elements up to the diagonal are asked
 * for, and tiles beyond it stay as they are. */
struct product {
    size m, n, k, shares, segments, complete, lower;
    struct plane a, b, c, base;
    const element *bias;
};

INLINE int is_row(const struct product *p) { return IS_FLOAT && p->m == 1; }

INLINE int has_floats(const struct plane *p) { return IS_FLOAT || p->floats; }

INLINE void *at(const struct plane *p, size row, size column) {
    const size place = row * p->row + column * p->column;
    return (char *)p->x + place * (size)(has_floats(p) ? sizeof(float) : sizeof(element));
}

INLINE const element *operand(const struct plane *p, size row, size column) {
    return (const element *)p->x + row * p->row + column * p->column;
}

INLINE vf load_from(const struct plane *p, size row, size column) {
    return has_floats(p) ? load((const float *)at(p, row, column)) : load((const element *)at(p, row, column));
}

INLINE void store_to(const struct plane *p, size row, size column, vf v) {
    if (has_floats(p))
        store((float *)at(p, row, column), v);
    else
        store((element *)at(p, row, column), v);
}

/* ---- the order of k ---- */

/* What is packed of k at a time: a part of a share, or so many whole ones as the tree joins to one sum. The tree's sums
 * are formed like the carries of a binary counter; those that wait for their other half are planes 0, 1, ... */
struct stretch {
    size first, chains, steps; /* so many chains of so many steps each, from step `first` of the order on */
    int top, to;               /* planes top - 1, ..., `to` join its sum in turn, and plane `to` takes it */
    int start, last;           /* whether the start joins it too; whether c takes it */
};

/* Shares that one stretch holds. */
static size shares_together(size share, size shares) {
    size count = 1;
    while (2 * count * share <= DEPTH && 2 * count <= shares) count *= 2;
    return count;
}

static struct stretch stretch_at(const struct product *p, size first) {
    const size share = p->k / p->shares, chains = shares_together(share, p->shares), whole = chains * share;
    const size number = first / whole, inside = first % whole, steps = chains > 1 ? share : least(DEPTH, share - inside);
    const int ends = inside + chains * steps == whole;
    int waiting = 0, joins = 0;
    for (size n = number; n; n >>= 1) waiting += n & 1;
    for (size n = number + 1; ends && !(n & 1) && joins < waiting; n >>= 1) joins++;
    const int last = first + chains * steps == p->k;
    return (struct stretch){
        first, chains, steps, waiting + (inside > 0), waiting - joins, p->complete ? last : first == 0, last};
}

/* Whether there are sums that wait, but not in c: what it starts from is there and must stay until all is summed, or it
 * has no floats. */
static int none_in_c(const struct product *p) {
    return ((p->base.x == p->c.x && p->complete) || !has_floats(&p->c)) && stretch_at(p, 0).last == 0;
}

/* Planes that need memory of their own: c is the first one if it can be. */
static size waiting_planes(const struct product *p) {
    const size share = p->k / p->shares;
    size planes = none_in_c(p);
    for (size sums = p->shares / shares_together(share, p->shares); sums > 1; sums /= 2)
        planes += sums > 2 || share > DEPTH;
    return planes;
}

/* Where in k a step of the order is. */
INLINE size place(const struct product *p, size step) {
    const size run = p->k / (p->shares * p->segments), part = step / run;
    if (p->segments == 1) return step;
    return (part % p->segments * p->shares + part / p->segments) * run + step % run;
}

/* So many steps lie one behind the other from there on. */
INLINE size run_from(const struct product *p, size step) {
    const size run = p->segments == 1 ? p->k : p->k / (p->shares * p->segments);
    return run - step % run;
}

/* ---- packing: strips of `width` lanes, element (i, lane) of a strip at i * width + lane, missing lanes zero ---- */

INLINE quad four_float(const float *from) { return *(const quad_any *)from; }
INLINE quad four_bf16(const bf16 *from) {
    return (quad){number(from[0]), number(from[1]), number(from[2]), number(from[3])};
}
#define four(from) OF(four, from)(from)

/* Four lanes of four steps turned round. */
INLINE void turn(const element *from, size lane, const int width, float *to) {
    quad a = four(from), b = four(from + lane), c = four(from + 2 * lane), d = four(from + 3 * lane);
    quad ab = PICK_FOUR(a, b, 0, 4, 1, 5), cd = PICK_FOUR(c, d, 0, 4, 1, 5);
    *(quad_any *)to = PICK_FOUR(ab, cd, 0, 1, 4, 5);
    *(quad_any *)(to + width) = PICK_FOUR(ab, cd, 2, 3, 6, 7);
    ab = PICK_FOUR(a, b, 2, 6, 3, 7), cd = PICK_FOUR(c, d, 2, 6, 3, 7);
    *(quad_any *)(to + 2 * width) = PICK_FOUR(ab, cd, 0, 1, 4, 5);
    *(quad_any *)(to + 3 * width) = PICK_FOUR(ab, cd, 2, 3, 6, 7);
}

/* Two lanes of four steps: what six lanes leave over. */
INLINE void turn_pair(const element *from, size lane, const int width, float *to) {
    quad a = four(from), b = four(from + lane);
    quad low = PICK_FOUR(a, b, 0, 4, 1, 5), high = PICK_FOUR(a, b, 2, 6, 3, 7);
    memcpy(to, &low, 8);
    memcpy(to + width, (float *)&low + 2, 8);
    memcpy(to + 2 * width, &high, 8);
    memcpy(to + 3 * width, (float *)&high + 2, 8);
}

INLINE void gather(size steps, size lanes, const element *from, size step, size lane, const int width, float *to) {
    for (size i = 0; i < steps; i++)
        for (size j = 0; j < lanes; j++) to[i * width + j] = number(from[i * step + j * lane]);
}

/* A whole strip whose steps lie one behind the other. */
INLINE void turn_strip(size steps, const element *from, size lane, const int width, float *to) {
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

/* Strips lie `apart` steps from one another. */
INLINE void pack_strips(
    size steps, size lanes, const element *from, size step, size lane, const int width, size apart, float *to) {
    const size whole = lanes - lanes % width;
    if (lane == 1) /* a step of all strips at once: it lies in one piece, and steps may be far apart */
        for (size i = 0; i < steps; i++)
            for (size j = 0; j < whole; j += width) {
                float *strip = to + j * apart + i * width;
                __builtin_prefetch(strip + 24, 1); /* its next line: stores that miss L1 wait for one another */
                if (IS_FLOAT)
                    memcpy(strip, from + i * step + j, (size_t)width * sizeof *to);
                else
                    gather(1, width, from + i * step + j, 0, 1, width, strip);
            }
    else
        for (size j = 0; j < whole; j += width)
            if (step == 1)
                turn_strip(steps, from + j * lane, lane, width, to + j * apart);
            else
                gather(steps, width, from + j * lane, step, lane, width, to + j * apart);
    if (whole < lanes) {
        memset(to + whole * apart, 0, (size_t)(steps * width) * sizeof *to);
        gather(steps, lanes - whole, from + whole * lane, step, lane, width, to + whole * apart);
    }
}

/* ---- the tile -------------------------------------------------------------------------------------------------- */

/* Memory that is wanted soon: one line every SPELL steps. */
struct ahead {
    const element *line;
    size step;
};

INLINE vf spread(const float *p) {
    int32_t bits;
    memcpy(&bits, p, sizeof bits);
    return (vf)(bits - (vi){0});
}

/* c + a b: a word is a float, or a pair of bf16 of two steps. */
#ifdef ELEMENT
INLINE vf multiply_add(vf a, vf b, vf c) { return dot2(c, (vi)a, (vi)b); }
#else
INLINE vf multiply_add(vf a, vf b, vf c) { return FMA(a, b, c); }
#endif

INLINE size words_of(size steps) { return IS_FLOAT ? steps : (steps + 1) / 2; }

INLINE void accumulate(vf sum[TALL][2], size words, const float *a, const float *b) {
#pragma GCC unroll 4
    for (size i = 0; i < words; i++, a += TALL, b += PANEL) {
        vf b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 12
        for (int r = 0; r < TALL; r++) {
            vf x = spread(a + r);
            sum[r][0] = multiply_add(x, b0, sum[r][0]);
            sum[r][1] = multiply_add(x, b1, sum[r][1]);
        }
    }
}

/* Of a strip of c: itself, what it starts from, and the planes of sums that wait. */
struct sums {
    struct plane c, base, plane[HALVINGS + 1];
    const element *bias;
};

/* Which plane takes the sums of a stretch. */
INLINE const struct plane *target_of(const struct stretch *k, const struct sums *s) {
    return k->last ? &s->c : &s->plane[k->to];
}

/* What waits for the sums of a tile at (i, j) joins them, and they go where they belong. */
INLINE void put_sums(vf sum[TALL][2], const struct stretch *k, const struct sums *s, size i, size j) {
    for (int t = k->top; t-- > k->to;) {
        const float *x = at(&s->plane[t], i, j);
#pragma GCC unroll 12
        for (int r = 0; r < TALL; r++, x += s->plane[t].row)
            sum[r][0] = load(x) + sum[r][0], sum[r][1] = load(x + W) + sum[r][1];
    }
    if (k->start) {
        vf bias0 = splat(0), bias1 = splat(0);
        if (s->bias) bias0 += load(s->bias + j), bias1 += load(s->bias + j + W);
#pragma GCC unroll 12
        for (int r = 0; r < TALL; r++) {
            vf start0 = bias0, start1 = bias1;
            if (s->base.x) {
                start0 += load_from(&s->base, i + r, j);
                start1 += load_from(&s->base, i + r, j + W);
            }
            sum[r][0] = start0 + sum[r][0];
            sum[r][1] = start1 + sum[r][1];
        }
    }
    const struct plane *target = target_of(k, s);
#pragma GCC unroll 12
    for (int r = 0; r < TALL; r++) store_to(target, i + r, j, sum[r][0]), store_to(target, i + r, j + W, sum[r][1]);
}

INLINE void fetch_tile(const struct plane *p, size i, size j) {
    for (int r = 0; r < TALL; r++) {
        __builtin_prefetch(at(p, i + r, j), 1);
        __builtin_prefetch(at(p, i + r, j + PANEL - 1), 1);
    }
}

INLINE void fetch_sums(const struct stretch *k, const struct sums *s, size i, size j) {
    fetch_tile(target_of(k, s), i, j);
    for (int t = k->to; t < k->top; t++) fetch_tile(&s->plane[t], i, j);
}

/* The tile of c (TALL, PANEL) at (i, j), of packed a (chains * words, TALL) and b (chains * words, PANEL). */
static __attribute__((noinline)) void whole_tile(
    size words, const float *a, const float *b, struct ahead ahead, const struct stretch *k, const struct sums *s, size i,
    size j) {
    const size whole = words - words % SPELL, late = most(0, whole - LATE);
    float held[HALVINGS][TALL * PANEL] __attribute__((aligned(64))); /* sums of shares that wait for the next */
    int holds = 0;
    for (size chain = 1;; chain++) {
        vf sum[TALL][2];
#pragma GCC unroll 12
        for (int r = 0; r < TALL; r++) sum[r][0] = sum[r][1] = splat(0);
        for (size at = 0; at < whole; at += SPELL, ahead.line += ahead.step) {
            __builtin_prefetch(ahead.line, 0, 2);
            if (at == late && chain == k->chains) fetch_sums(k, s, i, j);
            accumulate(sum, SPELL, a + at * TALL, b + at * PANEL);
        }
        accumulate(sum, words - whole, a + whole * TALL, b + whole * PANEL);
        for (size n = chain; !(n & 1); n >>= 1) {
            const float *x = held[--holds];
#pragma GCC unroll 12
            for (int r = 0; r < TALL; r++, x += PANEL)
                sum[r][0] = load(x) + sum[r][0], sum[r][1] = load(x + W) + sum[r][1];
        }
        if (chain == k->chains) {
            put_sums(sum, k, s, i, j);
            return;
        }
        float *x = held[holds++];
#pragma GCC unroll 12
        for (int r = 0; r < TALL; r++, x += PANEL) store(x, sum[r][0]), store(x + W, sum[r][1]);
        a += words * TALL, b += words * PANEL;
    }
}

/* ---- blocks ---------------------------------------------------------------------------------------------------- */

/* What turn `turn` of tiles fetches of a block at `from`: one of its rows where steps lie one behind the other,
 * else some steps of one line. As many turns as a line has elements fetch the next panel of b, BAND turns the next band
 * of a. */
INLINE struct ahead lines(const element *from, size step, size lane, size turn) {
    const size whole = 64 / (size)sizeof *from, spells = words_of(DEPTH) / SPELL;
    if (step == 1) return (struct ahead){from + turn * lane, whole};
    return (struct ahead){from + turn % whole * spells * step + turn / whole * whole + whole - 1, step};
}

/* (rows, columns) of a plane, from (i, j) on, and those of a whole tile, become one another. */
INLINE void take_tile(size rows, size columns, const struct plane *from, size i, size j, float *tile) {
    for (size r = 0; r < rows; r++, tile += PANEL)
        if (has_floats(from))
            memcpy(tile, at(from, i + r, j), (size_t)columns * sizeof *tile);
        else
            gather(1, columns, at(from, i + r, j), 0, 1, 0, tile);
}

INLINE void put_tile(size rows, size columns, const float *tile, const struct plane *to, size i, size j) {
    for (size r = 0; r < rows; r++, tile += PANEL)
        if (has_floats(to))
            memcpy(at(to, i + r, j), tile, (size_t)columns * sizeof *tile);
        else
            for (size c = 0; c < columns; c += W)
                store_some((element *)at(to, i + r, j + c), columns - c, load(tile + c));
}

/* A tile at an edge, (rows, columns): the same on copies that are whole. */
INLINE void edge_tile(
    size words, const float *a, const float *b, struct ahead ahead, const struct stretch *k, const struct sums *s, size i,
    size j, size rows, size columns) {
    float copies[HALVINGS + 3][TALL * PANEL];
    element bias[PANEL];
    struct sums whole = {{copies[0], PANEL, 1, 1}, {0}, {{0}}, 0};
    memset(copies, 0, sizeof copies);
    if (k->start && s->bias) {
        memset(bias, 0, sizeof bias);
        memcpy(bias, s->bias + j, (size_t)columns * sizeof *bias);
        whole.bias = bias;
    }
    if (k->start && s->base.x) {
        whole.base = (struct plane){copies[1], PANEL, 1, 1};
        take_tile(rows, columns, &s->base, i, j, copies[1]);
    }
    for (int t = k->to; t == k->to || t < k->top; t++) {
        whole.plane[t] = (struct plane){copies[2 + t], PANEL, 1, 1};
        if (t < k->top) take_tile(rows, columns, &s->plane[t], i, j, copies[2 + t]);
    }
    whole_tile(words, a, b, ahead, k, &whole, 0, 0);
    put_tile(rows, columns, target_of(k, &whole)->x, target_of(k, s), i, j);
}

/* A stretch of lanes, from lane 0 on at `from`, becomes strips of words. */
INLINE void pack_words(
    const struct product *p, const struct stretch *k, size lanes, const element *from, size step, size lane,
    const int width, float *to) {
    const size steps = k->chains * k->steps;
    for (size done = 0, run; done < steps; done += run) {
        run = least(steps - done, run_from(p, k->first + done));
        pack_strips(run, lanes, from + place(p, k->first + done) * step, step, lane, width, steps, to + done * width);
    }
#ifdef ELEMENT
    for (size j = 0; j < lanes; j += width)
        for (size chain = 0; chain < k->chains; chain++) {
            float *strip = to + j * steps;
            pair_steps(k->steps, width, strip + chain * k->steps * width, strip + chain * words_of(k->steps) * width);
        }
#endif
}

/* Columns of b that are packed at a time: all of a strip, or, where one band of a is all there is, one panel, which is
 * used at once and gives way to the next. */
static size packed_columns(size m, size n) { return m <= BAND ? PANEL : round_up(least(n, STRIP), PANEL); }

/* Floats between rows of a plane that waits: not a power of two, so that the rows of a tile spread over L1. */
static size waiting_row(size n) { return round_up(least(n, STRIP), PANEL) + 16; }

/* Rows of c whose sums wait at a time. */
static size herd(size n) { return most(1, WAITING / waiting_row(n) / BAND) * BAND; }

static size packed_floats(const struct product *p) {
    return least(p->k, DEPTH) * (packed_columns(p->m, p->n) + round_up(least(p->m, BAND), TALL));
}

/* Floats of work space. */
static size product_work(const struct product *p) {
    if (is_row(p)) return 16 + round_up(p->k, PANEL) + DEPTH * PANEL;
    const size planes = waiting_planes(p);
    return 16 + packed_floats(p) + planes * least(p->m, herd(p->n)) * waiting_row(p->n);
}

/* What a band of a, from row i, adds to a strip of c, from column j, by a stretch of k. Its first band packs b. */
INLINE void multiply_band(
    const struct product *p, const struct stretch *k, const struct sums *s, size i, size j, float *panels,
    float *band) {
    const struct plane *a = &p->a, *b = &p->b;
    const size steps = k->chains * k->steps, words = words_of(k->steps), first = place(p, k->first);
    const size rows = least(BAND, p->m - i), columns = least(STRIP, (p->lower ? i + rows : p->n) - j);
    pack_words(p, k, rows, operand(a, i, 0), a->column, a->row, TALL, band);
    size turn = 0;
    for (size across = 0; across < columns; across += PANEL) {
        const size wide = least(PANEL, columns - across), column = j + across;
        float *panel = p->m <= BAND ? panels : panels + across * steps;
        if (p->lower ? column >= i : i == 0) pack_words(p, k, wide, operand(b, 0, column), b->row, b->column, PANEL, panel);
        for (size down = 0; down < rows; down += TALL, turn++) {
            const size tall = least(TALL, rows - down);
            if (p->lower && column >= i + down + tall) continue;
            const float *left = band + down * steps;
            const struct ahead ahead = i == 0
                ? lines(operand(b, first, column + PANEL), b->row, b->column, down / TALL)
                : lines(operand(a, i + BAND, first), a->column, a->row, least(turn, BAND - 1));
            if (tall == TALL && wide == PANEL)
                whole_tile(words, left, panel, ahead, k, s, i + down, across);
            else
                edge_tile(words, left, panel, ahead, k, s, i + down, across, tall, wide);
        }
    }
}

INLINE struct plane shifted(struct plane p, size row, size column) {
    if (p.x) p.x = at(&p, row, column);
    return p;
}

INLINE void multiply_rows(const struct product *p, float *work) {
    float *panels = align_line(work), *band = panels + least(p->k, DEPTH) * packed_columns(p->m, p->n);
    const size row = waiting_row(p->n), waiting = waiting_planes(p), own = none_in_c(p);
    float *planes = panels + packed_floats(p);
    for (size j = 0; j < p->n; j += STRIP) {
        const struct plane c = shifted(p->c, 0, j);
        struct sums sums = {c, shifted(p->base, 0, j), {c}, p->bias ? p->bias + j : 0};
        for (size t = 0; t < waiting; t++) sums.plane[t + !own] = (struct plane){planes + t * p->m * row, row, 1, 1};
        struct stretch k;
        for (size first = 0; first < p->k; first += k.chains * k.steps) {
            k = stretch_at(p, first);
            for (size i = 0; i < p->m; i += BAND) multiply_band(p, &k, &sums, i, j, panels, band);
        }
    }
}

/* ---- one row --------------------------------------------------------------------------------------------------- */

/* Columns [j, j + some) of c where it is one row, in the same order of additions. `row`: a, in the order of steps. b is
 * read where it lies, `vectors` vectors of a step at once; or, where `panel` is given, two of what is packed there. */
INLINE void columns_of_row(
    const struct product *p, const float *row, size j, size some, const int vectors, float *panel) {
    const size share = p->k / p->shares, stride = panel ? PANEL : p->b.row;
    vf held[HALVINGS + 1][8], start[8];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
        const size left = most(0, some - v * W);
        start[v] = splat(0);
        if (p->bias) start[v] += load_some(p->bias + j + v * W, left, 0);
        if (p->base.x) start[v] += load_some((const float *)at(&p->base, 0, j + v * W), left, 0);
    }
    int holds = 0;
    for (size g = 0; g < p->shares; g++) {
        for (size done = 0, steps; done < share; done += steps) {
            steps = least(DEPTH, share - done);
            const size first = g * share + done;
            vf sum[8];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) sum[v] = splat(0);
            for (size at = 0, run; at < steps; at += run) {
                run = least(steps - at, run_from(p, first + at));
                const element *from = operand(&p->b, place(p, first + at), j);
                if (panel) pack_strips(run, some, from, p->b.row, p->b.column, PANEL, run, panel);
                const float *b = panel ? panel : (const float *)from, *x = row + first + at;
                for (size i = 0; i < run; i++, b += stride) {
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; v++) {
                        const size left = panel ? W : some - v * W;
                        sum[v] = FMA(spread(x + i), load_some(b + v * W, left, 0), sum[v]);
                    }
                }
            }
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) {
                if (p->complete)
                    held[holds][v] = done ? held[holds][v] + sum[v] : sum[v];
                else
                    start[v] = start[v] + sum[v];
            }
        }
        holds++;
        for (size n = g + 1; !(n & 1); n >>= 1, holds--)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) held[holds - 2][v] = held[holds - 2][v] + held[holds - 1][v];
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++)
        if (v * W < some)
            store_some((float *)at(&p->c, 0, j + v * W), some - v * W, p->complete ? start[v] + held[0][v] : start[v]);
}

/* No panel of b is used twice: where columns lie side by side none is packed. */
static void product_of_row(const struct product *p, float *work) {
    float *row = align_line(work), *panel = row + round_up(p->k, PANEL);
    for (size step = 0; step < p->k; step++) row[step] = number(*operand(&p->a, 0, place(p, step)));
    size j = 0;
    if (p->b.column != 1) {
        for (; j < p->n; j += PANEL) columns_of_row(p, row, j, least(PANEL, p->n - j), 2, panel);
        return;
    }
    for (; j + 8 * W <= p->n; j += 8 * W) columns_of_row(p, row, j, 8 * W, 8, 0);
    for (; j < p->n; j += W) columns_of_row(p, row, j, least(W, p->n - j), 1, 0);
}

INLINE void product(const struct product *p, float *work) {
    if (is_row(p)) {
        product_of_row(p, work);
        return;
    }
    const size rows = waiting_planes(p) ? herd(p->n) : p->m;
    for (size i = 0; i < p->m; i += rows) {
        struct product part = *p;
        part.m = least(rows, p->m - i);
        part.a = shifted(p->a, i, 0), part.c = shifted(p->c, i, 0), part.base = shifted(p->base, i, 0);
        multiply_rows(&part, work);
    }
}
