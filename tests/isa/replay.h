/* Shared by replay.c and the two programs around it: linux.c (a process) and bare.c (a machine without a system). */
#include <stdint.h>

/* The head of the file of calls. */
struct calls {
    int64_t count, bytes;
};

void say(const char *text);

/* Runs the recorded calls; the number of functions whose results differ. */
int replay(const struct calls *calls);
