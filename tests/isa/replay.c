/* Makes the calls that record.py wrote down, at LEVEL, and compares the memory they leave with what they left there:
 * bit by bit, but any NaN equals any NaN, because CPUs differ in the one they make. No C library is needed. */
#include "replay.h"
#include "functions.h"
#include <string.h>

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

union argument {
    int64_t n;
    int i;
    float f;
    void *p;
};

struct call {
    char label[LABEL_BYTES];
    int64_t function, memory, chunks;
    union argument arguments[MAX_ARGUMENTS];
};

struct chunk {
    char *at;
    int64_t bytes, element, changed; /* element: 2, 4 or 8 for floats, 1 for anything else */
};

#define FUNCTION(name, parameters, arguments)                                                                          \
    void JOIN(name, LEVEL) parameters;                                                                                 \
    static void call_##name(const union argument *a) { JOIN(name, LEVEL) arguments; }
FUNCTIONS
#undef FUNCTION

#define FUNCTION(name, parameters, arguments) {#name, call_##name, 0, 0, 0},
static struct function {
    const char *name;
    void (*run)(const union argument *);
    int64_t calls, elements, wrong; /* elements that calls change */
} functions[] = {FUNCTIONS};
#undef FUNCTION

static void say_number(uint64_t number, unsigned base) {
    char digits[21], *p = digits + 20;
    *p = 0;
    do *--p = "0123456789abcdef"[number % base];
    while (number /= base);
    say(p);
}

static uint64_t bits_at(const char *p, int64_t element) {
    uint64_t bits = 0;
    memcpy(&bits, p, (size_t)element);
    return bits;
}

static int is_nan(uint64_t bits, int64_t element) {
    if (element == 2) return (bits & 0x7FFF) > 0x7F80;
    if (element == 4) return (bits & 0x7FFFFFFF) > 0x7F800000;
    return element == 8 && (bits & 0x7FFFFFFFFFFFFFFF) > 0x7FF0000000000000;
}

static void say_difference(const struct call *call, int64_t chunk, int64_t place, uint64_t got, uint64_t expected) {
    say(call->label), say(": piece "), say_number((uint64_t)chunk, 10);
    say(", element "), say_number((uint64_t)place, 10);
    say(" is "), say_number(got, 16), say(", expected "), say_number(expected, 16), say("\n");
}

static int64_t padded(const struct chunk *chunk) { return (chunk->bytes + 7) / 8 * 8; }

/* The memory before follows a chunk's head; where the call changes it, the memory after follows that. */
static const char *end_of(const struct chunk *chunk) {
    return (const char *)(chunk + 1) + (chunk->changed ? 2 : 1) * padded(chunk);
}

static int equal(const char *a, const char *b, int64_t bytes) {
    int64_t i = 0;
    for (; i + 8 <= bytes; i += 8)
        if (bits_at(a + i, 8) != bits_at(b + i, 8)) return 0;
    return bits_at(a + i, bytes - i) == bits_at(b + i, bytes - i);
}

static void compare(const struct call *call, int64_t number, const struct chunk *chunk) {
    struct function *function = &functions[call->function];
    const char *expected = end_of(chunk) - padded(chunk);
    const int64_t element = chunk->element, count = chunk->bytes / element;
    if (chunk->changed) function->elements += count;
    if (equal(chunk->at, expected, chunk->bytes)) return;
    for (int64_t i = 0; i < count; i++) {
        uint64_t a = bits_at(chunk->at + i * element, element), b = bits_at(expected + i * element, element);
        if (a == b || (is_nan(a, element) && is_nan(b, element))) continue;
        if (!function->wrong++) say_difference(call, number, i, a, b);
    }
}

static const char *replay_call(const struct call *call) {
    const char *p = (const char *)(call + 1);
    memset((void *)ARENA, POISON, (size_t)call->memory);
    for (int64_t i = 0; i < call->chunks; i++, p = end_of((const void *)p)) {
        const struct chunk *chunk = (const void *)p;
        memcpy(chunk->at, chunk + 1, (size_t)chunk->bytes);
    }
    functions[call->function].run(call->arguments);
    functions[call->function].calls++;
    p = (const char *)(call + 1);
    for (int64_t i = 0; i < call->chunks; i++, p = end_of((const void *)p)) compare(call, i, (const void *)p);
    return p;
}

static void say_function(const struct function *function) {
    say("  "), say(function->name), say(": "), say_number((uint64_t)function->wrong, 10), say(" of ");
    say_number((uint64_t)function->elements, 10), say(" elements differ\n");
}

int replay(const struct calls *calls) {
    const char *next = (const char *)(calls + 1);
    for (int64_t i = 0; i < calls->count; i++) next = replay_call((const void *)next);
    int wrong = 0, called = 0;
    uint64_t elements = 0;
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        called += functions[i].calls > 0;
        elements += (uint64_t)functions[i].elements;
        if (!functions[i].wrong) continue;
        wrong++;
        say_function(&functions[i]);
    }
    say(wrong ? "different: " : "equal: "), say_number((uint64_t)elements, 10), say(" elements of ");
    say_number((uint64_t)calls->count, 10), say(" calls of "), say_number((uint64_t)called, 10), say(" functions\n");
    return wrong;
}
