/* Rows of a table, and their gradients added in position order. */
void EXPORT(embedding_forward)(size n, size c, const int32_t *ids, const float *table, float *out) {
    for (size i = 0; i < n; i++) memcpy(out + i * c, table + ids[i] * c, (size_t)c * sizeof *out);
}

void EXPORT(embedding_backward)(size n, size c, const float *dy, const int32_t *ids, float *dtable) {
    for (size i = 0; i < n; i++, dy += c) {
        float *row = dtable + ids[i] * c;
        for (size j = 0; j < c; j += W)
            store_some(row + j, c - j, load_some(row + j, c - j, 0) + load_some(dy + j, c - j, 0));
    }
}
