/* out[b] = sum of squares of block b of x, in float64: LANES partial sums, then a tree. */
void EXPORT(clip_squares)(size n, size block, const float *x, double *out) {
    for (size a = 0; a < n; a += block) {
        double sum[LANES] = {0};
        const float *p = x + a;
        size count = least(block, n - a), whole = count - count % LANES;
        for (size i = 0; i < whole; i += LANES)
#pragma omp simd
            for (int j = 0; j < LANES; j++) sum[j] += (double)p[i + j] * (double)p[i + j];
        for (size i = whole; i < count; i++) sum[i - whole] += (double)p[i] * (double)p[i];
        for (int half = LANES / 2; half; half /= 2)
            for (int i = 0; i < half; i++) sum[i] += sum[i + half];
        out[a / block] = sum[0];
    }
}
