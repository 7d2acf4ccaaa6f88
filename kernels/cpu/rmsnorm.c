/* One row at a time, in cache: mean square, result. */

void EXPORT(rmsnorm_forward)(
    size rows, size c, const element *x, const element *gain, float epsilon, element *y, float *inverse_out) {
    for (size n = 0; n < rows; n++, x += c, y += c) {
        const float inverse = inverse_root(c, x, epsilon);
        for (size i = 0; i < c; i += W) {
            size some = c - i;
            store_some(y + i, some, load_some(x + i, some, 0) * inverse * load_some(gain + i, some, 0));
        }
        inverse_out[n] = inverse;
    }
}

/* dx = (g - n mean(g n)) inverse, plus `add` where given; g = dy gain, n = x inverse. The gain's gradients of `pieces`
 * equal groups of rows are summed, each over ascending rows, and joined by the tree. `work` holds c floats for every
 * binary digit of `pieces`. */
void EXPORT(rmsnorm_backward)(
    size rows, size c, size pieces, const element *dy, const element *x, const element *gain, const float *inverses,
    const element *add, element *dx, float *dgain, int accumulate, float *work) {
    const size group = rows / pieces;
    float *gains = work; /* sums of the newest piece */
    for (size piece = 0, n = 0; piece < pieces; piece++, gains += c) {
        memset(gains, 0, (size_t)c * sizeof *gains);
        for (size stop = n + group; n < stop; n++, x += c, dy += c, dx += c) {
            const float inverse = inverses[n];
            vf along[PARTS] = {{0}};
            for (size i = 0; i < c; i += LANES)
                for (int j = 0; j < PARTS; j++) {
                    size at = i + j * W, some = most(0, c - at);
                    vf d = load_some(dy + at, some, 0), normal = load_some(x + at, some, 0) * inverse;
                    along[j] = FMA(d * load_some(gain + at, some, 0), normal, along[j]);
                    store_some(gains + at, some, FMA(d, normal, load_some(gains + at, some, 0)));
                }
            const float slope = sum_lanes(along) / (float)c;
            for (size i = 0; i < c; i += W) {
                size some = c - i;
                vf normal = load_some(x + i, some, 0) * inverse;
                vf g = FMA(normal, splat(-slope), load_some(dy + i, some, 0) * load_some(gain + i, some, 0));
                store_some(dx + i, some, FMA(g, splat(inverse), add ? load_some(add + i, some, 0) : splat(0)));
            }
            if (add) add += c;
        }
        for (int more = joins(piece, pieces); more; more--, gains -= c)
            for (size i = 0; i < c; i++) gains[i - c] += gains[i];
    }
    for (size i = 0; i < c; i++) dgain[i] = accumulate ? dgain[i] + work[i] : work[i];
}
