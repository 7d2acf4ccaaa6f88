/* Which levels this CPU can run. */
#include <string.h>

__attribute__((visibility("default"))) int level_available(const char *level) {
    if (!strcmp(level, "base")) return 1;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(level, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(level, "avx512")) return avx512;
#if defined(__clang__) || __GNUC__ >= 11 /* older compilers do not know the instruction */
    if (!strcmp(level, "avx512bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#endif
    return 0;
}
