/* cap tanh(x / cap) */
INLINE vf capped_at(vf x, float cap) { return vtanh(x * (1.0f / cap)) * cap; }

/* x *= the slope of the cap, 1 - (l / cap)^2, at the capped l. */
INLINE void slope_row(size n, float *x, const float *capped, float cap) {
    const float inverse = 1.0f / cap;
    for (size i = 0; i < n; i += W) {
        vf t = load_some(capped + i, n - i, 0) * inverse;
        store_some(x + i, n - i, load_some(x + i, n - i, 0) * FMA(-t, t, splat(1)));
    }
}

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

/* The whole of a row at once, or what a rank does that holds some columns, between sums over ranks. */
INLINE float largest(size v, const float *logits) {
    vf top[PARTS];
    for (int j = 0; j < PARTS; j++) top[j] = splat(-__builtin_inff());
    for (size i = 0; i < v; i += LANES)
        for (int j = 0; j < PARTS; j++)
            top[j] = MAX(load_some(logits + i + j * W, most(0, v - i - j * W), -__builtin_inff()), top[j]);
    return max_lanes(top);
}

INLINE double loss_of(float total, float shift, float wanted) {
    return log_of(total) + ((double)shift - (double)wanted);
}

INLINE void divide_row(size v, float *row, float total) {
    for (size i = 0; i < v; i += W) store_some(row + i, v - i, load_some(row + i, v - i, 0) / total);
}

void EXPORT(crossentropy_capped)(size n, const element *logits, float cap, element *capped) {
    for (size i = 0; i < n; i += W) store_some(capped + i, n - i, capped_at(load_some(logits + i, n - i, 0), cap));
}

#ifndef ELEMENT
void EXPORT(crossentropy_exponentials)(
    size rows, size v, float *logits, const float *shifts, size shares, float *totals) {
    for (size r = 0; r < rows; r++, logits += v) totals[r] = sum_of_shares(shares, v, logits, shifts[r], 1);
}

void EXPORT(crossentropy_losses)(size rows, const float *totals, const float *shifts, const float *wanted, double *losses) {
    for (size r = 0; r < rows; r++) losses[r] = loss_of(totals[r], shifts[r], wanted[r]);
}

/* A target below zero lies in another rank's columns. `capped`: the capped logits, or NULL without a cap. */
void EXPORT(crossentropy_gradient)(
    size rows, size v, float *logits, const float *totals, const int32_t *targets, const float *capped, float cap) {
    for (size r = 0; r < rows; r++, logits += v) {
        divide_row(v, logits, totals[r]);
        if (targets[r] >= 0) logits[targets[r]] -= 1.0f;
        if (capped) slope_row(v, logits, capped + r * v, cap);
    }
}
#endif

/* Softmax cross-entropy of rows of logits, in place: a row is read from memory once and stays in L2.
 * losses[r] in nats, 0 where the mask hides the row. With `gradient`, the logits become softmax - onehot, times the slope
 * of the cap, if that is not 0. `work`: v floats where there is a cap, and v where logits are no floats. */
void EXPORT(crossentropy_rows)(
    size rows, size v, element *logits, const int32_t *targets, const uint8_t *mask, int gradient, size shares,
    double *losses, float cap, float *work) {
    for (size r = 0; r < rows; r++, logits += v) {
        if (mask && !mask[r]) {
            if (gradient) memset(logits, 0, (size_t)v * sizeof *logits);
            losses[r] = 0.0;
            continue;
        }
        float *row = widened(v, logits, work), *capped = row == work ? work + v : work;
        if (cap != 0) {
            for (size i = 0; i < v; i += W) store_some(row + i, v - i, capped_at(load_some(row + i, v - i, 0), cap));
            if (gradient) memcpy(capped, row, (size_t)v * sizeof *row);
        }
        float wanted = row[targets[r]];
        float shift = largest(v, row);
        float total = sum_of_shares(shares, v, row, shift, gradient);
        losses[r] = loss_of(total, shift, wanted);
        if (gradient) {
            divide_row(v, row, total);
            row[targets[r]] -= 1.0f;
            if (cap != 0) slope_row(v, row, capped, cap);
            give_back(v, row, logits);
        }
    }
}
