/* Rows of a table, and their gradients. */
void EXPORT(embedding_forward)(size n, size c, const int32_t *ids, const element *table, element *out) {
    for (size i = 0; i < n; i++) memcpy(out + i * c, table + ids[i] * c, (size_t)c * sizeof *out);
}

/* `order`: positions sorted by id, equal ids as they come. The rows of an id are summed, then join the table's row. */
void EXPORT(embedding_backward)(
    size n, size c, const element *dy, const int32_t *ids, const int64_t *order, float *dtable) {
    for (size first = 0, stop; first < n; first = stop) {
        float *row = dtable + ids[order[first]] * c;
        for (stop = first + 1; stop < n && ids[order[stop]] == ids[order[first]];) stop++;
        for (size j = 0; j < c; j += LANES) {
            vf sum[PARTS];
            for (int k = 0; k < PARTS; k++) sum[k] = load_some(dy + order[first] * c + j + k * W, most(0, c - j - k * W), 0);
            for (size i = first + 1; i < stop; i++)
                for (int k = 0; k < PARTS; k++)
                    sum[k] += load_some(dy + order[i] * c + j + k * W, most(0, c - j - k * W), 0);
            for (int k = 0; k < PARTS; k++) {
                size some = most(0, c - j - k * W);
                store_some(row + j + k * W, some, load_some(row + j + k * W, some, 0) + sum[k]);
            }
        }
    }
}
