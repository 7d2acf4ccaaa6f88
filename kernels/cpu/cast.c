/* Floats, rounded. */
void EXPORT(cast_to)(size n, const float *x, element *out) {
    for (size i = 0; i < n; i += W) store_some(out + i, n - i, load_some(x + i, n - i, 0));
}
