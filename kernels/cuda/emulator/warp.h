// What the lanes of a warp do together: __syncwarp, shuffles, votes.
#pragma once
namespace cu {

inline Group &group_of(unsigned mask) {
    if (!(mask >> current->lane & 1))
        fail("lane %d calls a warp collective with mask %08x, which leaves it out", current->lane, mask);
    mask &= current->warp->alive;  // lanes that have returned do not count
    for (auto *group : current->warp->groups)
        if (group->mask == mask) return *group;
    auto *group = new Group;
    group->mask = mask;
    current->warp->groups.push_back(group);
    return *group;
}

// Every lane of `mask` hands in `bytes` of input; the last to come runs leader(group, parity), which fills the outputs; each
// lane gets its own.
template <class F>
inline const unsigned char *collective(unsigned mask, const void *in, size_t bytes, const char *why, F leader) {
    Quiet quiet;
    if (bytes > Group::SLOT) fail("%s: %zu bytes", why, bytes);
    Group &group = group_of(mask);
    unsigned epoch = group.epoch, parity = epoch & 1;
    if (bytes) std::memcpy(group.in[parity][current->lane], in, bytes);
    released(group.in[parity]);
    progress();
    if (++group.come == __builtin_popcount(group.mask)) {
        acquired(group.in[parity]);
        leader(group, parity);
        group.come = 0;
        group.epoch++;
        released(group.out[parity]);
    }
    while (group.epoch == epoch) yield(why);
    acquired(group.out[parity]);
    go_on();
    return group.out[parity][current->lane];
}

// Each lane gets the value of lane `source`: its own where source is negative, as for a distance that leaves the width; NaN
// where that lane takes no part, which hardware leaves undefined.
template <class T> inline T shuffle(unsigned mask, T value, int source, const char *why) {
    struct Lane {
        int source;
        T value;
    } in{source < 0 ? running()->lane : source, value};
    auto *out = collective(mask, &in, sizeof in, why, [](Group &group, int parity) {
        for (int lane = 0; lane < 32; lane++) {
            if (!(group.mask >> lane & 1)) continue;
            int from = reinterpret_cast<const Lane *>(group.in[parity][lane])->source;
            std::memset(group.out[parity][lane], 0xff, sizeof(T));
            if (group.mask >> from & 1)
                std::memcpy(group.out[parity][lane], &reinterpret_cast<const Lane *>(group.in[parity][from])->value, sizeof(T));
        }
    });
    std::memcpy(&value, out, sizeof value);
    return value;
}

}  // namespace cu

inline void __syncwarp(unsigned mask = ~0u) {
    cu::collective(mask, nullptr, 0, "__syncwarp", [](cu::Group &, int) {});
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned vote = predicate != 0;
    auto *out = cu::collective(mask, &vote, sizeof vote, "__ballot_sync", [](cu::Group &group, int parity) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; lane++)
            if (group.mask >> lane & 1) votes |= unsigned(group.in[parity][lane][0]) << lane;
        for (int lane = 0; lane < 32; lane++) std::memcpy(group.out[parity][lane], &votes, sizeof votes);
    });
    std::memcpy(&vote, out, sizeof vote);
    return vote;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T> inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    int segment = cu::running()->lane & ~(width - 1);
    return cu::shuffle(mask, value, segment | (source & (width - 1)), "__shfl_sync");
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int pattern, int width = 32) {
    int lane = cu::running()->lane, source = lane ^ pattern;
    return cu::shuffle(mask, value, source < (lane & ~(width - 1)) + width ? source : -1, "__shfl_xor_sync");
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    int lane = cu::running()->lane, source = lane + int(distance);
    return cu::shuffle(mask, value, (lane & (width - 1)) + int(distance) < width ? source : -1, "__shfl_down_sync");
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
    int lane = cu::running()->lane, source = lane - int(distance);
    return cu::shuffle(mask, value, (lane & (width - 1)) >= int(distance) ? source : -1, "__shfl_up_sync");
}
