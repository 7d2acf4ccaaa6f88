/* All ops at one level: a level_*.c sets the target, LEVEL and W, and includes this; a bf16_*.c sets ELEMENT first. */
#include "common.h"

#include "dropout.c"

#include "adamw.c"
#include "attention.c"
#include "crossentropy.c"
#include "embedding.c"
#include "gelu.c"
#include "layernorm.c"
#include "linear.c"
#include "matmul.c"
#include "recurrence.h"
#include "gru.c"
#include "lstm.c"
#include "relu2.c"
#include "rmsnorm.c"
#include "rotary.c"
#include "swiglu.c"

#ifdef ELEMENT
#include "cast.c"
#else
#include "clip.c"
#include "polar.c"
#include "sums.c"
#endif
