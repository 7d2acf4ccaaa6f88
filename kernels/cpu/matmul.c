/* c = bias + base + a b. Of floats; or a, b and bias of bf16, base and c either, products and sums float32. */
#ifdef ELEMENT
#include "bf16.h"
#endif

#include "product.h"

size EXPORT(matmul_work)(const struct product *p) { return product_work(p); }

void EXPORT(matmul)(const struct product *p, float *work) { product(p, work); }
