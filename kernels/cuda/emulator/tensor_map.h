// What driver.cpp writes into a tensor map and hopper.h reads: 128 bytes, as the real, opaque one has.
#pragma once
#include <cstdint>

struct alignas(64) CUtensorMap {
    static constexpr uint64_t MAGIC = 0x54454e534f524d32;  // tells a map from other memory
    static constexpr int RANK = 5;

    uint64_t magic, base;
    uint64_t pitch[RANK - 1];           // bytes from one index to the next in dims 1, 2, ..; dim 0 is contiguous
    uint32_t size[RANK];                // of the tensor, innermost first
    uint16_t box[RANK];                 // of the tile a copy moves
    uint8_t rank, element_bytes, swizzle_bytes;  // swizzle_bytes: 16 (none), 32, 64, 128
};
static_assert(sizeof(CUtensorMap) == 128, "kernels take it by value as 128 bytes");

// Where a 16-byte piece lies: within rows of `span` bytes, the row's number (mod span / 16) is added without carry.
// The pattern is one of addresses: it repeats every 8 * span bytes, counted from address 0 of shared memory.
inline uint32_t swizzled(uint32_t address, uint32_t span) {
    return address ^ ((address >> 7 & (span / 16 - 1)) << 4);
}
