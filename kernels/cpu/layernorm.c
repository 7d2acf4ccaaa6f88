/* One row at a time, in cache: mean, variance about the mean, result. */

void EXPORT(layernorm_forward)(
    size rows, size c, const element *x, const element *gain, const element *bias, float epsilon, element *y,
    float *mean_out, float *inverse_out) {
    for (size n = 0; n < rows; n++, x += c, y += c) {
        vf sum[PARTS] = {{0}}, squares[PARTS] = {{0}};
        for (size i = 0; i < c; i += LANES)
            for (int j = 0; j < PARTS; j++) sum[j] += load_some(x + i + j * W, most(0, c - i - j * W), 0);
        float mean = sum_lanes(sum) / (float)c;
        for (size i = 0; i < c; i += LANES)
            for (int j = 0; j < PARTS; j++) {
                vf d = load_some(x + i + j * W, most(0, c - i - j * W), mean) - mean;
                squares[j] = FMA(d, d, squares[j]);
            }
        float inverse = 1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)c + epsilon);
        for (size i = 0; i < c; i += W) {
            size some = c - i;
            vf normal = (load_some(x + i, some, 0) - mean) * inverse;
            store_some(y + i, some, FMA(normal, load_some(gain + i, some, 0), load_some(bias + i, some, 0)));
        }
        mean_out[n] = mean, inverse_out[n] = inverse;
    }
}

/* dx = (g - mean(g) - n mean(g n)) / deviation, plus `add` where given; g = dy gain, n = normalised x.
 * The gain and bias gradients of `pieces` equal groups of rows are summed, each over ascending rows, and joined by the
 * tree. `work` holds 2c floats for every binary digit of `pieces`. */
void EXPORT(layernorm_backward)(
    size rows, size c, size pieces, const element *dy, const element *x, const element *gain, const float *means,
    const float *inverses, const element *add, element *dx, float *dgain, float *dbias, int accumulate, float *work) {
    const size group = rows / pieces;
    float *gains = work; /* sums of the newest piece: gains, behind them biases */
    for (size piece = 0, n = 0; piece < pieces; piece++, gains += 2 * c) {
        float *biases = gains + c;
        for (size i = 0; i < 2 * c; i += W) store_some(gains + i, 2 * c - i, splat(0));
        for (size stop = n + group; n < stop; n++, x += c, dy += c, dx += c) {
            float mean = means[n], inverse = inverses[n];
            vf sum[PARTS] = {{0}}, along[PARTS] = {{0}};
            for (size i = 0; i < c; i += LANES)
                for (int j = 0; j < PARTS; j++) {
                    size at = i + j * W, some = most(0, c - at);
                    vf d = load_some(dy + at, some, 0), normal = (load_some(x + at, some, mean) - mean) * inverse;
                    vf g = d * load_some(gain + at, some, 0);
                    sum[j] += g;
                    along[j] = FMA(g, normal, along[j]);
                    store_some(gains + at, some, FMA(d, normal, load_some(gains + at, some, 0)));
                    store_some(biases + at, some, load_some(biases + at, some, 0) + d);
                }
            float middle = sum_lanes(sum) / (float)c, slope = sum_lanes(along) / (float)c;
            for (size i = 0; i < c; i += W) {
                size some = c - i;
                vf normal = (load_some(x + i, some, 0) - mean) * inverse;
                vf g = FMA(load_some(dy + i, some, 0), load_some(gain + i, some, 0), splat(-middle));
                g = FMA(normal, splat(-slope), g);
                store_some(dx + i, some, FMA(g, splat(inverse), add ? load_some(add + i, some, 0) : splat(0)));
            }
            if (add) add += c;
        }
        for (int more = joins(piece, pieces); more; more--, gains -= 2 * c)
            for (size i = 0; i < 2 * c; i++) gains[i - 2 * c] += gains[i];
    }
    for (size i = 0; i < c; i++) {
        dgain[i] = accumulate ? dgain[i] + work[i] : work[i];
        dbias[i] = accumulate ? dbias[i] + work[c + i] : work[c + i];
    }
}
