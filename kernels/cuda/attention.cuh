// What the attention kernels share: where arrays lie, which keys a query sees, and in which order tiles are worked off.
#pragma once
#include "philox.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

// An array (batch, heads, rows, width) whose last dim is contiguous; strides in elements.
struct View {
    ELEMENT *data;
    int64_t batch, head, row;
};

struct Problem {
    const int *lengths;  // (batch,): how many keys a row of the batch may see, or null: all
    int batch, heads, queries, keys, width;
    int causal;  // the queries are the last of the positions
    int group;   // heads whose keys and values fit into the L2 cache together
    int share;   // positions that are summed by themselves (attention.cu)
    float scale;
    // of dropped weights, where a source is compiled with DROPOUT: which mask, and where in it those of a head begin
    Draw draw;
    uint64_t start;
    int64_t by_batch, by_head, by_query;

    __device__ int length(int b) const { return lengths ? max(0, min(lengths[b], keys)) : keys; }
    __device__ int offset() const { return keys - queries; }
    // scores are kept in base 2: exp2 is one instruction, exp two
    __device__ float scale_2() const { return scale * LOG2_E; }
    // query t sees the keys before this one
    __device__ int limit(int t, int length) const { return causal ? min(length, t + offset() + 1) : length; }
    // queries before this one see no key from `key` on
    __device__ int first_query(int key) const { return causal ? max(0, key - offset()) : 0; }
    // the last of the queries that share positions with query t, and one
    __device__ int share_end(int t) const {
        return min(queries, ((t + offset()) / share + 1) * share - offset());
    }
};

// What backward keeps of a query: log-sum-exp of its scores in base 2, and Σ do·o.
struct Statistics {
    float level, delta;
};

constexpr int PADDED = 128;  // statistics come in rows of a multiple of this, zero beyond the last query

// One head of one row of the batch, and a tile of its queries or keys.
struct Work {
    int b, h, tile;

    __device__ ELEMENT *rows(const View &x) const { return x.data + b * x.batch + h * x.head; }
    // where its numbers begin in an array (batch, heads, queries)
    __device__ int64_t row(const Problem &p) const { return (int64_t(b) * p.heads + h) * p.queries; }
    // and in one of statistics
    __device__ int64_t padded_row(const Problem &p) const {
        return (int64_t(b) * p.heads + h) * ((p.queries + PADDED - 1) / PADDED * PADDED);
    }
    // whether dropout keeps a weight; a call of Philox for each, so it costs more than all else
    __device__ bool kept(const Problem &p, int t, int key) const {
        uint64_t element = p.start + b * p.by_batch + h * p.by_head + t * p.by_query + key;
        return dropout_factors<1>(p.draw, element).at[0] > 0.0f;
    }
};

// What this block does. Heads come in groups that share the L2 cache; within one, the tile changes slowest and the
// longest come first (of causal queries the last, `descending`), so that short ones fill the gaps at the end.
__device__ __forceinline__ Work work_of(const Problem &p, int tiles, bool descending) {
    int group = blockIdx.x / (p.group * tiles), place = blockIdx.x % (p.group * tiles);
    int heads = min(p.group, p.batch * p.heads - group * p.group);
    int head = group * p.group + place % heads, tile = place / heads;
    return {head / p.heads, head % p.heads, descending ? tiles - 1 - tile : tile};
}
