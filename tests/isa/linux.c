/* Replays a file of calls in a process, on this CPU or under qemu-user. */
#include "replay.h"
#include "functions.h"
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>

void say(const char *text) { fputs(text, stdout); }

int main(int count, char **arguments) {
    struct stat about;
    int file = count == 2 ? open(arguments[1], O_RDONLY) : -1;
    if (file < 0 || fstat(file, &about)) return perror("the file of calls"), 2;
    const struct calls *calls = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    void *arena = mmap((void *)ARENA, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (calls == MAP_FAILED || arena != (void *)ARENA) return perror("mmap"), 2;
    return replay(calls) > 0;
}
