/* out[b] = sum of squares of block b of x, in float64: LANES partial sums, then a tree. x has rows of `columns` elements,
 * `pitch` apart; a block is that many elements in the order of rows, wherever rows end. */
void EXPORT(clip_squares)(size rows, size columns, size pitch, size block, const float *x, double *out) {
    double sum[LANES] = {0};
    size at = 0, left = rows * columns; /* in the block; until the end */
    for (size r = 0; r < rows; r++)
        for (size c = 0; c < columns;) {
            const float *p = x + r * pitch + c;
            size count = least(columns - c, block - at), i = 0;
            for (; i < count && (at + i) % LANES; i++) sum[(at + i) % LANES] += (double)p[i] * (double)p[i];
            for (; i + LANES <= count; i += LANES)
#pragma omp simd
                for (int j = 0; j < LANES; j++) sum[j] += (double)p[i + j] * (double)p[i + j];
            for (; i < count; i++) sum[(at + i) % LANES] += (double)p[i] * (double)p[i];
            c += count, at += count, left -= count;
            if (at < block && left) continue;
            for (int half = LANES / 2; half; half /= 2)
                for (int k = 0; k < half; k++) sum[k] += sum[k + half];
            *out++ = sum[0];
            memset(sum, 0, sizeof sum);
            at = 0;
        }
}
