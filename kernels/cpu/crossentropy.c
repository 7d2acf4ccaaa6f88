/* The sum of exp(x - shift) over a share of a row, which with `keep` becomes these. */
INLINE float sum_of_exp(size n, float *x, float shift, int keep) {
    vf sum[PARTS] = {{0}};
    for (size i = 0; i < n; i += LANES)
        for (int j = 0; j < PARTS; j++) {
            size at = i + j * W, some = most(0, n - at);
            vf e = vexp(load_some(x + at, some, -__builtin_inff()) - shift);
            sum[j] += e;
            if (keep) store_some(x + at, some, e);
        }
    return sum_lanes(sum);
}

/* The sums of `shares` shares, a power of two, each in LANES lanes of its own, joined by a tree. */
static float sum_of_shares(size shares, size n, float *x, float shift, int keep) {
    if (shares == 1) return sum_of_exp(n, x, shift, keep);
    const float left = sum_of_shares(shares / 2, n / 2, x, shift, keep);
    return left + sum_of_shares(shares / 2, n / 2, x + n / 2, shift, keep);
}

/* Softmax cross-entropy of rows of logits, in place: a row is read from memory once and stays in L2.
 * losses[r] in nats, 0 where the mask hides the row. With `gradient`, the logits become softmax - onehot. */
void EXPORT(crossentropy_rows)(
    size rows, size v, float *logits, const int32_t *targets, const uint8_t *mask, int gradient, size shares,
    double *losses) {
    for (size r = 0; r < rows; r++, logits += v) {
        if (mask && !mask[r]) {
            if (gradient) memset(logits, 0, (size_t)v * sizeof *logits);
            losses[r] = 0.0;
            continue;
        }
        float wanted = logits[targets[r]];
        vf top[PARTS];
        for (int j = 0; j < PARTS; j++) top[j] = splat(-__builtin_inff());
        for (size i = 0; i < v; i += LANES)
            for (int j = 0; j < PARTS; j++)
                top[j] = MAX(load_some(logits + i + j * W, most(0, v - i - j * W), -__builtin_inff()), top[j]);
        float shift = max_lanes(top);
        float total = sum_of_shares(shares, v, logits, shift, gradient);
        losses[r] = log_of(total) + ((double)shift - (double)wanted);
        if (gradient) {
            for (size i = 0; i < v; i += W) store_some(logits + i, v - i, load_some(logits + i, v - i, 0) / total);
            logits[targets[r]] -= 1.0f;
        }
    }
}
