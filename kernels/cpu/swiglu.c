/* y = silu(a) b with silu(a) = a sigmoid(a); x has rows of n gates a, then n numbers b. */
void EXPORT(swiglu_forward)(size rows, size n, const element *x, element *y) {
    for (size r = 0; r < rows; r++, x += 2 * n, y += n)
        for (size i = 0; i < n; i += W) {
            vf a = load_some(x + i, n - i, 0), b = load_some(x + n + i, n - i, 0);
            store_some(y + i, n - i, a * sigmoid(a) * b);
        }
}

/* da = dy b (s + a s (1 - s)), db = dy a s: s again, as in gelu.c. dx may be x. */
void EXPORT(swiglu_backward)(size rows, size n, const element *dy, const element *x, element *dx) {
    for (size r = 0; r < rows; r++, dy += n, x += 2 * n, dx += 2 * n)
        for (size i = 0; i < n; i += W) {
            vf a = load_some(x + i, n - i, 0), b = load_some(x + n + i, n - i, 0), d = load_some(dy + i, n - i, 0);
            vf s = sigmoid(a), silu = a * s;
            store_some(dx + i, n - i, FMA(silu, 1.0f - s, s) * b * d);
            store_some(dx + n + i, n - i, silu * d);
        }
}
