/* What every CPU of the architecture can do: SSE2 on x86-64, NEON on aarch64. */
#define LEVEL base
#define W 4
#include "ops.h"
