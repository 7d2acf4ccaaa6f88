/* What a matrix product leaves over: the bias gradient. */

/* db (f) = or += column sums of dy (n, f), eight rows at a time. */
void EXPORT(linear_bias_gradient)(size n, size f, const float *dy, float *db, int accumulate) {
    if (!accumulate) memset(db, 0, (size_t)f * sizeof *db);
    for (size r = 0; r < n; r += 8, dy += 8 * f) {
        const float *row[8];
        for (size k = 0; k < 8; k++) row[k] = dy + least(k, n - r - 1) * f; /* those past the end are not read */
        const int all = n - r >= 8;
        for (size i = 0; i < f; i += W) {
            size some = f - i;
            vf x[8];
            if (all && some >= W)
                for (int k = 0; k < 8; k++) x[k] = load(row[k] + i);
            else
                for (int k = 0; k < 8; k++) x[k] = k < n - r ? load_some(row[k] + i, some, 0) : splat(0);
            vf sum = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
            store_some(db + i, some, load_some(db + i, some, 0) + sum);
        }
    }
}
