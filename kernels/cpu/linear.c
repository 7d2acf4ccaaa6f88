/* What a matrix product leaves over: the bias gradient. */
#define HEIGHT 32  /* most sums of pieces at a time: binary digits of their number */
#define CHUNK 4096

INLINE vf eight(const vf *x) { return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])); }

/* sum (n) = or += the sum of up to eight rows, in a tree; those that are missing count as zeros. */
INLINE void add_rows(const int rows, size n, size stride, const element *x, int add, float *sum) {
    const size whole = n - n % W, some = n - whole;
    vf v[8];
    for (size i = 0; i < whole; i += W) {
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) v[k] = k < rows ? load(x + k * stride + i) : splat(0);
        store(sum + i, (add ? load(sum + i) : splat(0)) + eight(v));
    }
    if (!some) return;
    for (int k = 0; k < 8; k++) v[k] = k < rows ? load_some(x + k * stride + whole, some, 0) : splat(0);
    store_some(sum + whole, some, (add ? load_some(sum + whole, some, 0) : splat(0)) + eight(v));
}

/* sum (n) = column sums of a piece, eight rows at a time. */
static void sum_piece(size rows, size n, size stride, const element *x, float *sum) {
    for (size r = 0; r < rows; r += 8, x += 8 * stride)
        switch (rows - r) {
        case 1: add_rows(1, n, stride, x, r > 0, sum); break;
        case 2: add_rows(2, n, stride, x, r > 0, sum); break;
        case 3: add_rows(3, n, stride, x, r > 0, sum); break;
        case 4: add_rows(4, n, stride, x, r > 0, sum); break;
        case 5: add_rows(5, n, stride, x, r > 0, sum); break;
        case 6: add_rows(6, n, stride, x, r > 0, sum); break;
        case 7: add_rows(7, n, stride, x, r > 0, sum); break;
        default: add_rows(8, n, stride, x, r > 0, sum); break;
        }
}

/* Floats of work space: a sum for every binary digit of `pieces`. */
size EXPORT(linear_work)(size f, size pieces) { return least(CHUNK, f) * (64 - __builtin_clzll((uint64_t)pieces)); }

/* db (f) = or += column sums of dy (rows, f): those of `pieces` equal groups of rows, joined by the tree. */
void EXPORT(linear_bias_gradient)(
    size rows, size f, size pieces, const element *dy, float *db, int accumulate, float *work) {
    const size group = rows / pieces;
    for (size at = 0; at < f; at += CHUNK) {
        const size n = least(CHUNK, f - at);
        float *sum = work; /* of the newest piece */
        if (rows == 0) memset(work, 0, (size_t)n * sizeof *work);
        for (size piece = 0; piece < pieces; piece++, sum += n) {
            sum_piece(group, n, f, dy + piece * group * f + at, sum);
            for (int more = joins(piece, pieces); more; more--, sum -= n)
                for (size i = 0; i < n; i++) sum[i - n] += sum[i];
        }
        for (size i = 0; i < n; i++) db[at + i] = accumulate ? db[at + i] + work[i] : work[i];
    }
}
#undef CHUNK
