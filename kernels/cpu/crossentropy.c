/* Softmax cross-entropy of rows of logits, in place: a row is read from memory once and stays in L2.
 * losses[r] in nats, 0 where the mask hides the row. With `gradient`, the logits become softmax - onehot. */
void EXPORT(crossentropy_rows)(
    size rows, size v, float *logits, const int32_t *targets, const uint8_t *mask, int gradient, double *losses) {
    for (size r = 0; r < rows; r++, logits += v) {
        if (mask && !mask[r]) {
            if (gradient) memset(logits, 0, (size_t)v * sizeof *logits);
            losses[r] = 0.0;
            continue;
        }
        float wanted = logits[targets[r]];
        vf top[PARTS], sum[PARTS] = {{0}};
        for (int j = 0; j < PARTS; j++) top[j] = splat(-__builtin_inff());
        for (size i = 0; i < v; i += LANES)
            for (int j = 0; j < PARTS; j++)
                top[j] = MAX(load_some(logits + i + j * W, most(0, v - i - j * W), -__builtin_inff()), top[j]);
        float shift = max_lanes(top);
        for (size i = 0; i < v; i += LANES)
            for (int j = 0; j < PARTS; j++) {
                size at = i + j * W, some = most(0, v - at);
                vf e = vexp(load_some(logits + at, some, -__builtin_inff()) - shift);
                sum[j] += e;
                if (gradient) store_some(logits + at, some, e);
            }
        float total = sum_lanes(sum);
        losses[r] = log_of(total) + ((double)shift - (double)wanted);
        if (gradient) {
            for (size i = 0; i < v; i += W) store_some(logits + i, v - i, load_some(logits + i, v - i, 0) / total);
            logits[targets[r]] -= 1.0f;
        }
    }
}
