// A launch: the blocks of a grid one after another, in an order that the seed chooses; what went wrong in them.
#pragma once
#include <csignal>
namespace cu {

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
struct Faults {  // while it lives, a touch of memory that is not there is an error of the kernel's thread
    struct sigaction before;
    Faults() {
        struct sigaction action {};
        action.sa_sigaction = [](int, siginfo_t *info, void *) { fail("invalid address %p", info->si_addr); };
        action.sa_flags = SA_SIGINFO | SA_NODEFER;  // the handler does not return
        sigaction(SIGSEGV, &action, &before);
    }
    ~Faults() { sigaction(SIGSEGV, &before, nullptr); }
};
#else
struct Faults {
    ~Faults() {}  // the sanitizer reports it
};
#endif

inline void run_block() {
    int threads = block.size.x * block.size.y * block.size.z;
    prepare_fibers(threads);
    block.barrier = Barrier{};
    for (auto &barrier : block.named) barrier = Barrier{};
    block.live = threads;
    block.polls = 0;
    forget_copies(threads);
    forget_hopper(threads);
    fill_shared();

    host.sanitized.be_current();
    for (auto &fiber : block.fibers) {
        fiber.sanitized.create(fiber.number);
        fiber.sanitized.start_from(host.sanitized);
    }
    current = &host;
    switch_to(make_ring(threads));
    current = nullptr;
    acquired(&host);
}

inline const char *wrong_at_end() { return shared_overrun() ? "a write behind dynamic shared memory" : finish_hopper(); }

inline void run_grid(dim3 grid, dim3 size, size_t shared_bytes) {
    Quiet quiet;
    Faults faults;
    error_length = 0;
    int threads = size.x * size.y * size.z;
    if (threads < 1 || threads > THREAD_LIMIT || size.z > 64) return say("blocks of %u x %u x %u", size.x, size.y, size.z);
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535)
        return say("a grid of %u x %u x %u", grid.x, grid.y, grid.z);
    if (shared_bytes > SHARED_LIMIT) return say("%zu bytes of dynamic shared memory", shared_bytes);
    block.grid = grid;
    block.size = size;
    place_shared(shared_bytes);
    for (int number : shuffled(grid.x * grid.y * grid.z)) {
        block.index = {number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
        run_block();
        if (!error_length)
            if (auto *wrong = wrong_at_end()) say("%s [block %u,%u,%u]", wrong, block.index.x, block.index.y, block.index.z);
        if (error_length) return;
    }
}

template <class T> inline T load(const void *at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

// As cuLaunchKernel takes them: pointers to the arguments; and their sizes, checked. 0; a wrong argument's number, from 1;
// -1: not so many; -2: see cu_error.
template <class... A, size_t... I>
inline int launch(void (*kernel)(A...), std::index_sequence<I...>, dim3 grid, dim3 size, size_t shared_bytes,
                  void **arguments, const size_t *sizes, int count) {
    if (count != int(sizeof...(A))) return -1;
    const size_t wanted[] = {sizeof(A)..., 0};
    for (int i = 0; i < count; i++)
        if (sizes[i] != wanted[i]) return i + 1;
    body = [=] { kernel(load<A>(arguments[I])...); };
    run_grid(grid, size, shared_bytes);
    return error_length ? -2 : 0;
}

template <class... A>
inline int launch(void (*kernel)(A...), const unsigned *grid, const unsigned *size, size_t shared_bytes,
                  void **arguments, const size_t *sizes, int count, uint64_t seed) {
    set_seed(seed);
    return launch(kernel, std::index_sequence_for<A...>{}, dim3{grid[0], grid[1], grid[2]},
                  dim3{size[0], size[1], size[2]}, shared_bytes, arguments, sizes, count);
}

}  // namespace cu

extern "C" const char *cu_error() { return cu::error; }

// what the caller finds by name for a kernel: cu_launch_<name>
#define CU_KERNEL(name)                                                                                           \
    extern "C" int cu_launch_##name(const unsigned *grid, const unsigned *size, size_t shared_bytes,              \
                                    void **arguments, const size_t *sizes, int count, uint64_t seed) {            \
        return cu::launch(&name, grid, size, shared_bytes, arguments, sizes, count, seed);                        \
    }
