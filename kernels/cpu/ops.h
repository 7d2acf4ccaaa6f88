/* All ops at one level: a level_*.c sets the target, LEVEL and W, and includes this. */
#include "common.h"

#include "dropout.c"

#include "adamw.c"
#include "attention.c"
#include "clip.c"
#include "crossentropy.c"
#include "embedding.c"
#include "gelu.c"
#include "layernorm.c"
#include "linear.c"
#include "matmul.c"
#include "relu2.c"
#include "rmsnorm.c"
#include "rotary.c"
#include "sums.c"
#include "swiglu.c"
