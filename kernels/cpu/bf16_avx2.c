/* The ops of level_avx2.c over bf16. */
#define ELEMENT bf16
#include "level_avx2.c"
