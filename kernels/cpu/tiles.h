/* Small matrix products in cache: a register tile, and the packing of its right factor. */
#define ROWS 6        /* rows of a register tile: 6 x 2 vectors of sums fill 12 of 16 registers */

/* c (rows, PANEL) = or += a (rows, k) times a packed panel b (k, PANEL); a has strides ra, ca.
 * Every element is one chain of multiply-adds over k: its bits do not depend on how the tiles lie. */
INLINE void tile(const int rows, size k, const float *a, size ra, size ca, const float *b, float *c, size rc, int add) {
    vf sum[ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        sum[r][0] = add ? load(c + r * rc) : splat(0);
        sum[r][1] = add ? load(c + r * rc + W) : splat(0);
    }
    for (size i = 0; i < k; i++, a += ca, b += PANEL) {
        vf b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            vf x = splat(a[r * ra]);
            sum[r][0] = FMA(x, b0, sum[r][0]);
            sum[r][1] = FMA(x, b1, sum[r][1]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        store(c + r * rc, sum[r][0]);
        store(c + r * rc + W, sum[r][1]);
    }
}

static void multiply(size rows, size k, const float *a, size ra, size ca, const float *b, float *c, size rc, int add) {
    switch (rows) {
    case 1: tile(1, k, a, ra, ca, b, c, rc, add); break;
    case 2: tile(2, k, a, ra, ca, b, c, rc, add); break;
    case 3: tile(3, k, a, ra, ca, b, c, rc, add); break;
    case 4: tile(4, k, a, ra, ca, b, c, rc, add); break;
    case 5: tile(5, k, a, ra, ca, b, c, rc, add); break;
    default: tile(6, k, a, ra, ca, b, c, rc, add); break;
    }
}

/* Panels of x (n, d): panel p is (n, PANEL), columns p*PANEL…; missing columns are zero. */
static void pack(size n, size d, const element *x, size stride, float scale, float *panels) {
    for (size p = 0; p < d; p += PANEL)
        for (size i = 0; i < n; i++, panels += PANEL) {
            store(panels, load_some(x + i * stride + p, most(0, least(W, d - p)), 0) * scale);
            store(panels + W, load_some(x + i * stride + p + W, most(0, least(W, d - p - W)), 0) * scale);
        }
}

/* Panels of x transposed, x (n, d): panel p is (d, PANEL), its columns are rows p*PANEL… of x. */
static void pack_transposed(size n, size d, const element *x, size stride, float *panels) {
    for (size p = 0; p < n; p += PANEL) {
        for (size j = 0; j < PANEL; j++)
            if (p + j < n)
                for (size i = 0; i < d; i++) panels[i * PANEL + j] = number(x[(p + j) * stride + i]);
            else
                for (size i = 0; i < d; i++) panels[i * PANEL + j] = 0;
        panels += d * PANEL;
    }
}
