/* y = max(x, 0)^2; a NaN stays one. */
void EXPORT(relu2_forward)(size n, const element *x, element *y) {
    for (size i = 0; i < n; i += W) {
        vf positive = MAX(splat(0), load_some(x + i, n - i, 0));
        store_some(y + i, n - i, positive * positive);
    }
}

/* dx may be dy. */
void EXPORT(relu2_backward)(size n, const element *dy, const element *x, element *dx) {
    for (size i = 0; i < n; i += W) {
        vf positive = MAX(splat(0), load_some(x + i, n - i, 0));
        store_some(dx + i, n - i, (positive + positive) * load_some(dy + i, n - i, 0));
    }
}
