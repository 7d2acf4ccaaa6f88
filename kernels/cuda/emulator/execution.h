// A block of threads on one OS thread: one fiber per CUDA thread. Fibers switch only where threads wait for each other, in an
// order that the seed chooses, so that a missing barrier is a wrong answer under some seed.
#pragma once
#include <sys/mman.h>
namespace cu {

constexpr size_t PAGE = 4096;
constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t SHARED_LIMIT = 227 << 10;  // dynamic shared memory of a block: the most an H100 gives
constexpr int THREAD_LIMIT = 1024;
constexpr unsigned char CANARY = 0xa5;

struct Barrier {
    int come = 0;        // threads that have come in this epoch
    unsigned epoch = 0;  // how often all have come
    int expected = 0, line = 0;
    struct Votes {
        int any = 0, all = 1, count = 0;
    } votes, result;

    // two tags: a thread may come to the next epoch before another has left this one
    const void *tag() const { return reinterpret_cast<const char *>(this) + 8 * (epoch & 1); }
};
static_assert(sizeof(Barrier) >= 16, "both tags lie inside");

struct Warp;

struct Fiber {
    uint3 index{};                // threadIdx
    int number = 0, lane = 0;     // in the block, in the warp
    Warp *warp = nullptr;
    const char *at = "run";       // what it waits for
    int line = 0;                 // and where, if known
    Fiber *next = nullptr, *previous = nullptr;  // the ring of fibers that have not returned
    void *stack_pointer = nullptr;
    bool done = false;
    SanitizedStack sanitized;
};

struct Block {
    dim3 grid, size;
    uint3 index{};
    unsigned char *shared = nullptr;
    size_t shared_bytes = 0;
    int live = 0;    // threads that have not returned
    long polls = 0;  // switches since anything last happened
    Barrier barrier, named[16];
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
};
inline Block block;
inline Fiber *current = nullptr, host;
inline std::function<void()> body;  // the kernel with its arguments

inline Fiber *running() {  // as kernels ask, outside any Quiet
#if defined(__SANITIZE_THREAD__)
    return __atomic_load_n(&current, __ATOMIC_RELAXED);
#else
    return current;
#endif
}

// ---- the seed ---------------------------------------------------------------------------------

inline uint64_t seed, random_state;

inline void set_seed(uint64_t number) {
    seed = number;
    random_state = number * 0x9e3779b97f4a7c15 | 1;
}

inline uint32_t draw() {  // Marsaglia's xorshift
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return uint32_t(random_state >> 16);
}

// Whether something asynchronous happens now, or as late as its wait allows; always late under seed 0.
inline bool early() {
    Quiet quiet;
    return seed && draw() & 1;
}

inline std::vector<int> shuffled(int n) {  // in order under seed 0
    std::vector<int> order(n);
    for (int i = 0; i < n; i++) order[i] = i;
    for (int i = n - 1; seed && i > 0; i--) std::swap(order[i], order[draw() % (i + 1)]);
    return order;
}

// ---- errors -----------------------------------------------------------------------------------

inline char error[4096];
inline size_t error_length = 0;

inline void say(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    error_length += std::vsnprintf(error + error_length, sizeof error - error_length, format, arguments);
    va_end(arguments);
    error_length = std::min(error_length, sizeof error - 1);
}

inline void switch_to(Fiber *to);

// back to the host, which reports what was said; the block's other threads are given up where they are
[[noreturn]] inline void abandon() {
    if (!current || current == &host) {
        std::fprintf(stderr, "CUDA emulator: %s\n", error);
        std::abort();
    }
    say(" [block %u,%u,%u thread %d]", block.index.x, block.index.y, block.index.z, current->number);
    block.live = 0;
    switch_to(&host);
    std::abort();
}

template <class... A> [[noreturn]] inline void fail(const char *format, A... arguments) {
    say(format, arguments...);
    abandon();
}

// ---- fibers -----------------------------------------------------------------------------------

// pushes what a function must preserve, exchanges the stack pointers, pops
__attribute__((naked, noinline, no_sanitize("thread", "address"))) inline void swap_stacks(void **, void *) {
#if defined(__x86_64__)
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n movq %rsp,(%rdi)\n"
        "movq %rsi,%rsp\n popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
#else
#error "the emulator switches stacks on x86-64 only: port swap_stacks"
#endif
}

inline void switch_to(Fiber *to) {
    Fiber *from = current;
    current = to;
    from->sanitized.leave(to->sanitized, from->done);
    swap_stacks(&from->stack_pointer, to->stack_pointer);
    current->sanitized.arrive();
}

inline void progress() { block.polls = 0; }

inline void report_deadlock() {
    say("deadlock:");
    const auto &fibers = block.fibers;
    for (size_t first = 0, next; first < fibers.size(); first = next) {
        next = first + 1;
        while (next < fibers.size() && fibers[next].at == fibers[first].at && fibers[next].line == fibers[first].line) next++;
        say(" threads %zu-%zu: %s", first, next - 1, fibers[first].at);
        if (fibers[first].line) say(" (line %d)", fibers[first].line);
        if (next < fibers.size()) say(";");
    }
    abandon();
}

// called while waiting: the next fiber's turn
inline void yield(const char *why) {
    current->at = why;
    if (++block.polls > 4L * block.live + 64) report_deadlock();  // all have had several turns, and nothing happened
    if (current->next != current) switch_to(current->next);
}

// what follows a wait for `why`
inline void go_on() {
    progress();
    current->at = "run";
    current->line = 0;
}

inline bool is_last(const Barrier &barrier, int threads) { return barrier.come == threads - 1; }

inline void open(Barrier &barrier) {
    barrier.come = 0;
    barrier.epoch++;
    barrier.result = barrier.votes;
    barrier.votes = {};
}

inline void arrive_at(Barrier &barrier, int threads) {
    released(barrier.tag());
    progress();
    if (++barrier.come == threads) open(barrier);
}

inline void wait_at(Barrier &barrier, int threads, const char *why) {
    const void *tag = barrier.tag();
    unsigned epoch = barrier.epoch;
    arrive_at(barrier, threads);
    while (barrier.epoch == epoch) yield(why);
    acquired(tag);
    go_on();
}

// __syncthreads and its kin: threads that have returned do not count
inline Barrier::Votes block_barrier(bool vote, int line) {
    Quiet quiet;
    Barrier &barrier = block.barrier;
    if (!barrier.come) barrier.line = line;
    if (barrier.line != line)  // PTX would count it, CUDA C++ forbids it
        fail("divergent __syncthreads: lines %d and %d", barrier.line, line);
    barrier.votes.any |= vote;
    barrier.votes.all &= vote;
    barrier.votes.count += vote;
    current->line = line;
    wait_at(barrier, block.live, "__syncthreads");
    return barrier.result;
}

// ---- blocks -----------------------------------------------------------------------------------

struct Group {  // lanes of a warp that meet under one mask
    unsigned mask = 0, epoch = 0;
    int come = 0;
    static constexpr size_t SLOT = 128;
    alignas(16) unsigned char in[2][32][SLOT], out[2][32][SLOT];  // two epochs: the slow read while the fast write
};

struct Warp {
    unsigned alive = 0;
    std::vector<Group *> groups;  // kept from block to block
};

inline void leave_ring(Fiber &fiber) {
    fiber.previous->next = fiber.next;
    fiber.next->previous = fiber.previous;
}

// One mapping for all stacks of all launches: a forbidden page below each would be two mappings a stack, and a process with
// many kernels would run out of them (vm.max_map_count). A canary at the bottom tells an overflow instead.
inline char *stack_of(size_t number) {
    static auto *stacks = static_cast<char *>(mmap(nullptr, THREAD_LIMIT * STACK_BYTES, PROT_READ | PROT_WRITE,
                                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    return stacks + number * STACK_BYTES;
}

inline void thread_main() {
    current->sanitized.enter(host.sanitized);
    body();
    released(&host);
    Quiet quiet;
    if (*stack_of(current->number) != char(CANARY)) fail("the stack of %zu bytes has overflowed", STACK_BYTES);
    current->done = true;
    current->at = "returned";
    progress();
    current->warp->alive &= ~(1u << current->lane);
    if (--block.live && block.barrier.come == block.live) open(block.barrier);
    leave_ring(*current);
    switch_to(block.live ? current->next : &host);
    std::abort();
}

inline void prepare_stack(Fiber &fiber) {
    char *stack = stack_of(fiber.number);
    void **top = reinterpret_cast<void **>(stack + STACK_BYTES) - 2;  // thread_main sees a stack aligned as after a call
    *top = reinterpret_cast<void *>(&thread_main);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    fiber.stack_pointer = top;
    *stack = char(CANARY);
    fiber.sanitized.lies_at(stack, STACK_BYTES);
}

inline void prepare_fibers(int threads) {
    block.fibers.assign(threads, Fiber{});
    block.warps.resize(std::max<size_t>(block.warps.size(), (threads + 31) / 32));
    for (auto &warp : block.warps) {
        warp.alive = 0;
        for (auto *group : warp.groups) group->come = 0;
    }
    dim3 size = block.size;
    for (int i = 0; i < threads; i++) {
        Fiber &fiber = block.fibers[i];
        fiber.number = i;
        fiber.lane = i % 32;
        fiber.warp = &block.warps[i / 32];
        fiber.warp->alive |= 1u << fiber.lane;
        fiber.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        prepare_stack(fiber);
    }
}

inline Fiber *make_ring(int threads) {
    std::vector<int> order = shuffled(threads);
    for (int i = 0; i < threads; i++) {
        Fiber &fiber = block.fibers[order[i]], &next = block.fibers[order[(i + 1) % threads]];
        fiber.next = &next;
        next.previous = &fiber;
    }
    return &block.fibers[order[0]];
}

// ---- shared memory ----------------------------------------------------------------------------

extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_cu_shared[], __stop_cu_shared[];

// Its end lies within 1 KiB of a page that may not be touched; the bytes between are canaries. Aligned to 1 KiB, as swizzles want.
inline void place_shared(size_t bytes) {
    static auto *memory = [] {
        auto *at = static_cast<unsigned char *>(mmap(nullptr, SHARED_LIMIT + PAGE + PAGE, PROT_READ | PROT_WRITE,
                                                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        size_t end = (SHARED_LIMIT + PAGE - 1) / PAGE * PAGE;
        mprotect(at + end, PAGE, PROT_NONE);
        return at + end;
    }();
    block.shared = memory - (bytes + 1023) / 1024 * 1024;
    block.shared_bytes = bytes;
}

inline size_t slack_bytes() { return (block.shared_bytes + 1023) / 1024 * 1024 - block.shared_bytes; }

inline void fill_shared() {
    std::memset(block.shared, 0xff, block.shared_bytes);  // NaN: reading what nobody wrote is seen
    std::memset(block.shared + block.shared_bytes, CANARY, slack_bytes());
    if (__start_cu_shared) std::memset(__start_cu_shared, 0xff, __stop_cu_shared - __start_cu_shared);
}

inline bool shared_overrun() {
    const unsigned char *slack = block.shared + block.shared_bytes;
    return std::any_of(slack, slack + slack_bytes(), [](unsigned char byte) { return byte != CANARY; });
}

}  // namespace cu
