// The one function of the CUDA driver that this project calls by itself, for a machine without a GPU: built as libcuda.so.1.
// It refuses what the driver refuses (CUDA Driver API, cuTensorMapEncodeTiled) and writes a map that hopper.h reads.
#include "tensor_map.h"

enum { SUCCESS = 0, INVALID_VALUE = 1 };
enum { FLOAT32 = 7, BFLOAT16 = 9 };  // CUtensorMapDataType; no other is used here

static bool tile_is_valid(uint32_t rank, const uint32_t *box, const uint32_t *steps, uint32_t element, uint32_t span) {
    for (uint32_t i = 0; i < rank; i++)
        if (box[i] < 1 || box[i] > 256 || steps[i] != 1) return false;  // steps up to 8 exist; none is used here
    uint32_t row = box[0] * element;
    return row % 16 == 0 && (span == 16 || row <= span);
}

static bool tensor_is_valid(uint32_t rank, uint64_t base, const uint64_t *sizes, const uint64_t *pitches) {
    if (base % 16) return false;
    for (uint32_t i = 0; i < rank; i++)
        if (sizes[i] < 1 || sizes[i] > UINT32_MAX) return false;
    for (uint32_t i = 0; i + 1 < rank; i++)
        if (pitches[i] % 16 || pitches[i] >= 1ull << 40) return false;
    return true;
}

extern "C" int cuTensorMapEncodeTiled(CUtensorMap *map, int type, uint32_t rank, void *address, const uint64_t *sizes,
                                      const uint64_t *pitches, const uint32_t *box, const uint32_t *steps,
                                      int interleave, int swizzle, int promotion, int fill) {
    static constexpr uint8_t SPANS[] = {16, 32, 64, 128};
    if (reinterpret_cast<uintptr_t>(map) % 64 || rank < 1 || rank > CUtensorMap::RANK) return INVALID_VALUE;
    if ((type != FLOAT32 && type != BFLOAT16) || swizzle < 0 || swizzle > 3) return INVALID_VALUE;
    if (interleave || promotion < 0 || promotion > 3 || fill) return INVALID_VALUE;
    uint8_t element = type == FLOAT32 ? 4 : 2;
    if (!tensor_is_valid(rank, reinterpret_cast<uint64_t>(address), sizes, pitches)) return INVALID_VALUE;
    if (!tile_is_valid(rank, box, steps, element, SPANS[swizzle])) return INVALID_VALUE;

    CUtensorMap made{};
    made.magic = CUtensorMap::MAGIC;
    made.base = reinterpret_cast<uint64_t>(address);
    made.rank = uint8_t(rank);
    made.element_bytes = element;
    made.swizzle_bytes = SPANS[swizzle];
    for (uint32_t i = 0; i < rank; i++) {
        made.size[i] = uint32_t(sizes[i]);
        made.box[i] = uint16_t(box[i]);
        if (i) made.pitch[i - 1] = pitches[i - 1];
    }
    *map = made;
    return SUCCESS;
}
