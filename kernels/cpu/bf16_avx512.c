/* The ops of level_avx512.c over bf16. */
#define ELEMENT bf16
#include "level_avx512.c"
