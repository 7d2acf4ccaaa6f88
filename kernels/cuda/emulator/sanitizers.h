// What ThreadSanitizer and AddressSanitizer must be told about fibers. In a plain build all of this is nothing.
#pragma once
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char *, int);
void AnnotateIgnoreReadsEnd(const char *, int);
void AnnotateIgnoreWritesBegin(const char *, int);
void AnnotateIgnoreWritesEnd(const char *, int);
}
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cu {

#if defined(__SANITIZE_THREAD__)
inline void begin_quiet() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
inline void end_quiet() { AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0); }
// what a thread did before `released(tag)` happened before what another does after `acquired(tag)`
inline void released(const void *tag) { __tsan_release(const_cast<void *>(tag)); }
inline void acquired(const void *tag) { __tsan_acquire(const_cast<void *>(tag)); }
#else
inline void begin_quiet() {}
inline void end_quiet() {}
inline void released(const void *) {}
inline void acquired(const void *) {}
#endif

struct Quiet {  // the emulator's own state is no race of the kernel's
    Quiet() { begin_quiet(); }
    ~Quiet() { end_quiet(); }
};
struct Loud {  // within a Quiet: this is the kernel's memory after all
    Loud() { end_quiet(); }
    ~Loud() { begin_quiet(); }
};

// A stack as the sanitizers know it. `enter` is the first thing on a new stack; `leave` comes before a switch to another,
// `arrive` after the switch back.
struct SanitizedStack {
#if defined(__SANITIZE_THREAD__)
    void *fiber = nullptr;

    void create(int number) {  // making one takes long: they are kept for the next block
        static std::vector<void *> fibers;
        while (int(fibers.size()) <= number) fibers.push_back(__tsan_create_fiber(0));
        fiber = fibers[number];
    }
    void be_current() { fiber = __tsan_get_current_fiber(); }
    void start_from(SanitizedStack &from) {  // what `from` did so far happened before this fiber
        released(this);
        __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
        acquired(this);
        __tsan_switch_to_fiber(from.fiber, __tsan_switch_to_fiber_no_sync);
    }
    void enter(SanitizedStack &) {}
    void leave(SanitizedStack &to, bool for_ever) {
        void *next = to.fiber;
        if (for_ever) end_quiet();
        __tsan_switch_to_fiber(next, __tsan_switch_to_fiber_no_sync);
    }
    void arrive() {}
#elif defined(__SANITIZE_ADDRESS__)
    const void *bottom = nullptr;
    size_t bytes = 0;
    void *fake = nullptr;

    void create(int) {}
    void be_current() {}
    void start_from(SanitizedStack &) {}
    void enter(SanitizedStack &from) { __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.bytes); }
    void leave(SanitizedStack &to, bool for_ever) {
        __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake, to.bottom, to.bytes);
    }
    void arrive() { __sanitizer_finish_switch_fiber(fake, nullptr, nullptr); }
#else
    void create(int) {}
    void be_current() {}
    void start_from(SanitizedStack &) {}
    void enter(SanitizedStack &) {}
    void leave(SanitizedStack &, bool) {}
    void arrive() {}
#endif
    void lies_at(void *stack, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
        bottom = stack, bytes = size;
        __asan_unpoison_memory_region(stack, size);  // frames of a fiber that was given up
#endif
        (void)stack, (void)size;
    }
};

}  // namespace cu
