/* The ops of level_base.c over bf16. */
#define ELEMENT bf16
#include "level_base.c"
