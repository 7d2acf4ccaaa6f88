/* What a matrix product leaves over: the bias gradient. */
#define HEIGHT 32  /* most sums of pieces at a time: binary digits of their number */
#define CHUNK 1024 /* columns at a time: a page of every row, and the sums lie in cache */

/* sum (n) += the sum of up to eight rows, in a tree; those that are missing count as zeros. */
INLINE void add_rows(const int rows, size n, size stride, const float *x, float *sum) {
    for (size i = 0; i < n; i += W) {
        size some = n - i;
        vf v[8];
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) v[k] = k < rows ? load_some(x + k * stride + i, some, 0) : splat(0);
        vf of_all = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
        store_some(sum + i, some, load_some(sum + i, some, 0) + of_all);
    }
}

/* sum (n) = column sums of a piece, eight rows at a time. */
static void sum_piece(size rows, size n, size stride, const float *x, float *sum) {
    memset(sum, 0, (size_t)n * sizeof *sum);
    for (; rows >= 8; rows -= 8, x += 8 * stride) add_rows(8, n, stride, x, sum);
    switch (rows) {
    case 1: add_rows(1, n, stride, x, sum); break;
    case 2: add_rows(2, n, stride, x, sum); break;
    case 3: add_rows(3, n, stride, x, sum); break;
    case 4: add_rows(4, n, stride, x, sum); break;
    case 5: add_rows(5, n, stride, x, sum); break;
    case 6: add_rows(6, n, stride, x, sum); break;
    case 7: add_rows(7, n, stride, x, sum); break;
    }
}

/* db (f) = or += column sums of dy (rows, f): those of `pieces` equal groups of rows, joined by the tree. */
void EXPORT(linear_bias_gradient)(size rows, size f, size pieces, const float *dy, float *db, int accumulate) {
    float sums[HEIGHT][CHUNK];
    const size group = rows / pieces;
    for (size at = 0; at < f; at += CHUNK) {
        const size n = least(CHUNK, f - at);
        int count = 0;
        for (size piece = 0; piece < pieces; piece++) {
            sum_piece(group, n, f, dy + piece * group * f + at, sums[count++]);
            for (int more = joins(piece, pieces); more; more--, count--)
                for (size i = 0; i < n; i++) sums[count - 2][i] += sums[count - 1][i];
        }
        for (size i = 0; i < n; i++) db[at + i] = accumulate ? db[at + i] + sums[0][i] : sums[0][i];
    }
}
#undef HEIGHT
#undef CHUNK
