// cp.async: copies of 16 bytes that each thread starts, gathers in groups and waits for.
#pragma once
namespace cu {

struct Copy {
    void *to;
    const void *from;  // null: zeros

    void run() const {
        if (from)
            std::memcpy(to, from, 16);
        else
            std::memset(to, 0, 16);
    }
};

struct Copies {  // of one thread
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};
inline Copies copies[THREAD_LIMIT];

inline void cp_async16(void *to, const void *from) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
        fail("cp.async: an address that is no multiple of 16");
    Copy copy{to, from};
    if (early())
        copy.run();
    else
        copies[running()->number].open.push_back(copy);
}

inline void cp_async_commit() {
    Copies &mine = copies[running()->number];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}

inline void cp_async_wait(size_t keep) {
    Copies &mine = copies[running()->number];
    while (mine.groups.size() > keep) {
        for (auto &copy : mine.groups.front()) copy.run();
        mine.groups.erase(mine.groups.begin());
    }
}

inline void forget_copies(int threads) {
    for (int i = 0; i < threads; i++) copies[i].open.clear(), copies[i].groups.clear();
}

}  // namespace cu
