/* Matrices made orthogonal by polynomials of their singular values, on the Gram matrix of the smaller side.
 *
 * The same products in the same order as ops/polar.py; of a symmetric one only tiles up to the diagonal are computed. */

/* Elements above the diagonal become those below it. */
static void mirror(size side, float *x) {
    for (size i = 0; i < side; i += W)
        for (size j = 0; j <= i; j += W) /* a block stays in L1 while it is turned */
            for (size r = i; r < least(i + W, side); r++)
                for (size c = j; c < least(j + W, r); c++) x[c * side + r] = x[r * side + c];
}

INLINE struct plane dense_plane(const float *x, size row, size column) { return (struct plane){(float *)x, row, column, 1}; }

/* out (side, side) = a b, known to be symmetric. */
static void symmetric(size side, size depth, struct plane a, struct plane b, float *out, float *work) {
    const struct product p = {.m = side, .n = side, .k = depth, .shares = 1, .segments = 1, .lower = 1,
                              .a = a, .b = b, .c = dense_plane(out, side, 1)};
    product(&p, work);
    mirror(side, out);
}

static void symmetric_square(size side, const float *a, const float *b, float *out, float *work) {
    symmetric(side, side, dense_plane(a, side, 1), dense_plane(b, side, 1), out, work);
}

/* out = a I + b G + c G^2 */
static void polynomial(size side, const float *gram, const float *square, const float abc[3], float *out) {
    for (size i = 0; i < side * side; i++) out[i] = square[i] * abc[2] + gram[i] * abc[1];
    for (size i = 0; i < side; i++) out[i * side + i] += abc[0];
}

static struct product last_product(size rows, size columns, const float *q, const float *given, float *x) {
    const int tall = rows > columns;
    const size side = least(rows, columns);
    const struct plane left = dense_plane(q, side, 1), whole = dense_plane(given, columns, 1);
    return (struct product){.m = rows, .n = columns, .k = side, .shares = 1, .segments = 1,
                            .a = tall ? whole : left, .b = tall ? left : whole, .c = dense_plane(x, columns, 1)};
}

/* Floats of work space: four squares, a copy of the matrix, and what its products take. */
size EXPORT(polar_work)(size rows, size columns) {
    const size side = least(rows, columns), large = most(rows, columns);
    const struct product gram = {.m = side, .n = side, .k = large, .shares = 1, .segments = 1, .c = {.floats = 1}};
    const struct product last = last_product(rows, columns, 0, 0, 0);
    return 4 * side * side + rows * columns + most(product_work(&gram), product_work(&last));
}

/* x (rows, columns) = p(x), in place; abc: a, b, c of each polynomial. */
static void one_matrix(size rows, size columns, size polynomials, const float *abc, float *x, float *work) {
    const size side = least(rows, columns), area = side * side;
    const int tall = rows > columns;
    float *gram = work, *square = gram + area, *p = square + area, *q = p + area, *given = q + area;
    work = given + rows * columns;
    const struct plane wide = dense_plane(x, tall ? 1 : columns, tall ? columns : 1);
    symmetric(side, most(rows, columns), wide, (struct plane){x, wide.column, wide.row, 1}, gram, work);
    for (size n = 0; n < polynomials; n++) {
        symmetric_square(side, gram, gram, square, work);
        polynomial(side, gram, square, abc + 3 * n, n == 0 ? q : p);
        if (n > 0) {
            symmetric_square(side, p, q, square, work);
            float *joined = square;
            square = q, q = joined;
        }
        if (n + 1 < polynomials) {
            const float *factor = n == 0 ? q : p;
            symmetric_square(side, gram, factor, square, work);
            symmetric_square(side, square, factor, gram, work);
        }
    }
    memcpy(given, x, (size_t)(rows * columns) * sizeof *x);
    const struct product last = last_product(rows, columns, q, given, x);
    product(&last, work);
}

/* `count` matrices (rows, columns), one behind the other. */
void EXPORT(polar_iterate)(
    size count, size rows, size columns, size polynomials, const float *abc, float *x, float *work) {
    for (size n = 0; n < count; n++) one_matrix(rows, columns, polynomials, abc, x + n * rows * columns, work);
}
