/* c = a b or c += a b by the sgemm of the BLAS that NumPy brings (64-bit integers), whose address comes from Python. */
typedef void (*gemm)(
    int order, int trans_a, int trans_b, size m, size n, size k, float alpha, const float *a, size lda, const float *b,
    size ldb, float beta, float *c, size ldc);

void EXPORT(matmul_add)(
    gemm sgemm, int trans_a, int trans_b, size m, size n, size k, const float *a, size lda, const float *b, size ldb,
    int accumulate, float *c, size ldc) {
    enum { row_major = 101, plain = 111, transposed = 112 };
    sgemm(
        row_major, trans_a ? transposed : plain, trans_b ? transposed : plain, m, n, k, 1.0f, a, lda, b, ldb,
        accumulate ? 1.0f : 0.0f, c, ldc);
}
