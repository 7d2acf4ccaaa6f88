/* Replays the calls on an emulated PC without an operating system. The disk is read by programmed I/O (ATA, 28-bit
 * sector numbers); port 0xE9 prints; port 0x8900 ends the emulation. */
#include "../replay.h"
#include <stddef.h>

#define CALLS 0x2000000 /* above the program, below the arena */
#define SECTOR 512

int level_available(const char *level);

static void out(uint16_t port, char byte) { __asm__ volatile("outb %0, %1" : : "a"(byte), "Nd"(port)); }

static char in(uint16_t port) {
    char byte;
    __asm__ volatile("inb %1, %0" : "=a"(byte) : "Nd"(port));
    return byte;
}

static void read_sector(uint32_t sector, char *to) {
    const char one = 1, read = 0x20, busy = (char)0x80, ready = 0x08;
    out(0x1F2, one);
    for (int i = 0; i < 3; i++) out((uint16_t)(0x1F3 + i), (char)(sector >> 8 * i));
    out(0x1F6, (char)(0xE0 | sector >> 24));
    out(0x1F7, read);
    while ((in(0x1F7) & (busy | ready)) != ready);
    size_t words = SECTOR / 4;
    __asm__ volatile("rep insl" : "+D"(to), "+c"(words) : "d"(0x1F0) : "memory");
}

static const struct calls *read_calls(void) {
    struct calls *calls = (struct calls *)CALLS;
    read_sector(0, (char *)calls);
    for (uint32_t i = 1; (int64_t)i * SECTOR < calls->bytes; i++) read_sector(i, (char *)calls + (size_t)i * SECTOR);
    return calls;
}

void say(const char *text) {
    while (*text) out(0xE9, *text++);
}

__attribute__((section(".text.enter"))) void enter(void) {
    if (level_available("avx512")) replay(read_calls());
    else say("dispatch.c does not find the AVX-512 of this CPU\n");
    for (const char *p = "Shutdown"; *p; p++) out(0x8900, *p);
}

/* What compilers call. Eight bytes at a time: an emulator's time goes by instructions. */
void *memcpy(void *restrict to, const void *restrict from, size_t n) {
    void *at = to;
    size_t eights = n / 8, rest = n % 8;
    __asm__ volatile("rep movsq" : "+D"(at), "+S"(from), "+c"(eights) : : "memory");
    __asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(rest) : : "memory");
    return to;
}

void *memmove(void *to, const void *from, size_t n) {
    unsigned char *t = to;
    const unsigned char *f = from;
    if (t < f)
        for (size_t i = 0; i < n; i++) t[i] = f[i];
    else
        while (n-- > 0) t[n] = f[n];
    return to;
}

void *memset(void *to, int byte, size_t n) {
    void *at = to;
    size_t eights = n / 8, rest = n % 8;
    uint64_t value = (byte & 0xFF) * 0x0101010101010101u;
    __asm__ volatile("rep stosq" : "+D"(at), "+c"(eights) : "a"(value) : "memory");
    __asm__ volatile("rep stosb" : "+D"(at), "+c"(rest) : "a"(value) : "memory");
    return to;
}

int strcmp(const char *a, const char *b) {
    while (*a && *a == *b) a++, b++;
    return *(const unsigned char *)a - *(const unsigned char *)b;
}
