/* y = x s with s = 1 / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3): the tanh form of GELU without a tanh.
 * Backward computes s again: that costs less than to write it and read it back. */
INLINE vf gelu_gate(vf x) {
    const vf linear = splat(-1.5957691216057308f), cubic = splat(-0.07135481282682852f); /* -2 sqrt(2/pi), times 0.044715 */
    return 1.0f / (1.0f + vexp(x * FMA(cubic, x * x, linear)));
}

INLINE vf gelu_slope(vf x) {
    const vf linear = splat(1.5957691216057308f), cubic = splat(0.21406443848048556f);
    vf s = gelu_gate(x);
    return FMA(x * FMA(cubic, x * x, linear), s * (1.0f - s), s);
}

void EXPORT(gelu_forward)(size n, const element *x, element *y) {
    for (size i = 0; i < n; i += W) {
        vf v = load_some(x + i, n - i, 0);
        store_some(y + i, n - i, v * gelu_gate(v));
    }
}

/* dx may be dy. */
void EXPORT(gelu_backward)(size n, const element *dy, const element *x, element *dx) {
    for (size i = 0; i < n; i += W)
        store_some(dx + i, n - i, load_some(dy + i, n - i, 0) * gelu_slope(load_some(x + i, n - i, 0)));
}
