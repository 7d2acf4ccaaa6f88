/* c = bias + base + a b in float32; the same with a and b rounded to bf16 as they are packed, products and sums float32. */
#include "bf16.h"

#include "product.h"

size EXPORT(matmul_work)(const struct product *p) { return product_work(p); }

#ifndef BF16_INSTRUCTION
void EXPORT(matmul_float32)(const struct product *p, float *work) { product(0, p, work); }
#endif

void EXPORT(matmul_bf16)(const struct product *p, float *work) { product(1, p, work); }
