/* Queries and keys, normalised if there is a gain, and turned by their positions. A head is D elements: pairs
 * (i, i + half) of the first 2 half are turned, the rest stays. */

struct heads {
    size batch, length, groups, units, width, half;
    size pieces, shares; /* of rows, of groups: sums of dgain */
};

/* Element (b, t, g, u, 0) lies b, t, g, u strides behind `data`. */
struct units {
    element *data;
    size b, t, g, u;
};

INLINE element *head_of(const struct units *x, size b, size t, size g, size u) {
    return x->data + b * x->b + t * x->t + g * x->g + u * x->u;
}

INLINE void put_turned(float *sum, element *to, size at, size some, vf v) {
    if (sum)
        store_some(sum + at, some, v);
    else
        store_some(to + at, some, v);
}

/* x, times `inverse` and gain if there is one, turned by the angles of cos and sin, goes to `sum`, or if that is absent
 * to `to`, which may be x. */
INLINE void turn_head(
    const struct heads *h, const element *x, const float *cos, const float *sin, float sign, const element *gain,
    float inverse, float *sum, element *to) {
    const size half = h->half;
    for (size i = 0; i < half; i += W) {
        const size some = half - i;
        vf a = load_some(x + i, some, 0), b = load_some(x + half + i, some, 0);
        const vf c = load_some(cos + i, some, 0), s = load_some(sin + i, some, 0) * sign;
        if (gain) {
            a = a * inverse * load_some(gain + i, some, 0);
            b = b * inverse * load_some(gain + half + i, some, 0);
        }
        put_turned(sum, to, i, some, FMA(a, c, -(b * s)));
        put_turned(sum, to, half + i, some, FMA(b, c, a * s));
    }
    for (size i = 2 * half; i < h->width; i += W) {
        const size some = h->width - i;
        vf a = load_some(x + i, some, 0);
        if (gain) a = a * inverse * load_some(gain + i, some, 0);
        put_turned(sum, to, i, some, a);
    }
}

/* y (batch, length, groups, units, width) and, with `gain`, inverse: of the same rows without their width. */
void EXPORT(rotary_forward)(
    const struct heads *h, const struct units *x, const float *cos, const float *sin, const element *gain,
    float epsilon, element *y, float *inverses) {
    for (size b = 0; b < h->batch; b++)
        for (size t = 0; t < h->length; t++)
            for (size g = 0; g < h->groups; g++)
                for (size u = 0; u < h->units; u++, y += h->width) {
                    const element *from = head_of(x, b, t, g, u), *scale = gain;
                    float inverse = 1;
                    if (gain) {
                        if (u == h->units - 1) scale += h->width;
                        *inverses++ = inverse = inverse_root(h->width, from, epsilon);
                    }
                    turn_head(h, from, cos + t * h->half, sin + t * h->half, 1, scale, inverse, 0, y);
                }
}

/* dx of a head from g, its gradient behind the gain: (g gain - n mean(g gain n)) inverse, n = x inverse; sums += g n. */
INLINE void normalised_backward(
    size width, const float *g, const element *x, const element *gain, float inverse, float *sums, element *dx) {
    vf along[PARTS] = {{0}};
    for (size i = 0; i < width; i += LANES)
        for (int j = 0; j < PARTS; j++) {
            size at = i + j * W, some = most(0, width - at);
            vf d = load_some(g + at, some, 0), normal = load_some(x + at, some, 0) * inverse;
            along[j] = FMA(d * load_some(gain + at, some, 0), normal, along[j]);
            store_some(sums + at, some, FMA(d, normal, load_some(sums + at, some, 0)));
        }
    const float slope = sum_lanes(along) / (float)width;
    for (size i = 0; i < width; i += W) {
        size some = width - i;
        vf normal = load_some(x + i, some, 0) * inverse;
        vf d = load_some(g + i, some, 0) * load_some(gain + i, some, 0);
        store_some(dx + i, some, FMA(normal, splat(-slope), d) * inverse);
    }
}

/* Sums of dgain: 2 width floats for every share, and those for every binary digit of `pieces`; behind them a head. */
size EXPORT(rotary_work)(const struct heads *h) {
    return 2 * h->width * h->shares * (64 - __builtin_clzll((uint64_t)h->pieces)) + h->width;
}

/* dx, which may be dy: turned back, then as of RMSNorm with `gain`, whose gradient has a sum for every share of the
 * groups and every piece of the rows, over rows, groups and units in ascending order; trees join pieces, then shares. */
void EXPORT(rotary_backward)(
    const struct heads *h, const struct units *dy, const struct units *x, const float *cos, const float *sin,
    const element *gain, const float *inverses, const struct units *dx, float *dgain, int accumulate, float *work) {
    const size all = gain ? 2 * h->width * h->shares : 0, group = h->batch * h->length / h->pieces;
    float *sums = work, *head = gain ? work + NAME(rotary_work)(h) - h->width : 0;
    for (size piece = 0, row = 0; piece < h->pieces; piece++, sums += all) {
        for (size i = 0; i < all; i++) sums[i] = 0;
        for (size stop = row + group; row < stop; row++) {
            const size b = row / h->length, t = row % h->length;
            for (size g = 0; g < h->groups; g++)
                for (size u = 0; u < h->units; u++) {
                    const element *from = head_of(dy, b, t, g, u);
                    element *to = head_of(dx, b, t, g, u);
                    const float *c = cos + t * h->half, *s = sin + t * h->half;
                    if (!gain) {
                        turn_head(h, from, c, s, -1, 0, 1, 0, to);
                        continue;
                    }
                    turn_head(h, from, c, s, -1, 0, 1, head, 0);
                    const size key = u == h->units - 1 ? h->width : 0;
                    float *sum = sums + g / (h->groups / h->shares) * 2 * h->width + key;
                    normalised_backward(
                        h->width, head, head_of(x, b, t, g, u), gain + key, *inverses++, sum, to);
                }
        }
        for (int more = joins(piece, h->pieces); more; more--, sums -= all)
            for (size i = 0; i < all; i++) sums[i - all] += sums[i];
    }
    if (!gain) return;
    const size each = 2 * h->width;
    size held = 0; /* sums of shares that wait, one behind the other from the start of `work` */
    for (size share = 0; share < h->shares; share++) {
        if (held != share) memcpy(work + held * each, work + share * each, (size_t)each * sizeof *work);
        held++;
        for (int more = joins(share, h->shares); more; more--, held--)
            for (size i = 0; i < each; i++) work[(held - 2) * each + i] += work[(held - 1) * each + i];
    }
    for (size i = 0; i < each; i++) dgain[i] = accumulate ? dgain[i] + work[i] : work[i];
}
