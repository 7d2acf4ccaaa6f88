// What the attention kernels share: where arrays lie, which keys a query sees, and in which order tiles are worked off.
#pragma once
#include "philox.cuh"

#ifndef STARTS  // whether queries may have a first key: where registers are short, a build of its own
#define STARTS 1
#endif

constexpr float LOG2_E = 1.4426950408889634f;

// An array (batch, heads, rows, width) whose last dim is contiguous; strides in elements. What lies between groups of
// heads is added by `group`: of keys and values that is all, their `head` is 0.
struct View {
    ELEMENT *data;
    int64_t batch, group, head, row;
};

struct Problem {
    const int *lengths;  // (batch,): how many keys a row of the batch may see, or null: all
    const int *starts;   // (batch, queries): the first key that a query sees, never descending; or null
    int starts_batch;    // from one row of the batch to the next
    int batch, groups, heads, queries, keys, width;  // the heads of a group have keys and values in common
    int causal;                                      // the queries are the last of the positions
    int close;   // groups whose keys and values fit into the L2 cache together
    int share;   // positions that are summed by themselves (attention.cu)
    float scale;
    // of dropped weights, where a source is compiled with DROPOUT: which mask, and where in it those of a head begin
    Draw draw;
    uint64_t first;
    int64_t by_batch, by_head, by_query;

    __device__ int length(int b) const { return lengths ? max(0, min(lengths[b], keys)) : keys; }
    __device__ int offset() const { return keys - queries; }
    // scores are kept in base 2: exp2 is one instruction, exp two
    __device__ float scale_2() const { return scale * LOG2_E; }
    // query t sees the keys before this one
    __device__ int limit(int t, int length) const { return causal ? min(length, t + offset() + 1) : length; }
    // query t sees no key before this one; those beyond the last see what the last sees
    __device__ int start(int b, int t) const {
        return STARTS && starts ? starts[int64_t(b) * starts_batch + min(t, queries - 1)] : 0;
    }
    // whether query t sees no key up to this one
    __device__ bool hides(int b, int t, int key) const { return STARTS && key < start(b, t); }
    // queries from this one on see no key before `key`
    __device__ int last_query(int b, int key) const {
        int low = 0, high = queries;
        while (STARTS && starts && low < high) {
            int middle = (low + high) / 2;
            if (start(b, middle) < key) low = middle + 1;
            else high = middle;
        }
        return high;
    }
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

// One head of queries of one row of the batch, and a tile of its queries or of the keys that it meets.
struct Work {
    int b, h, g, tile;

    __device__ ELEMENT *rows(const View &x) const {
        return x.data + b * x.batch + h * x.head + g * x.group;
    }
    // where nothing lies between groups, as in o
    __device__ ELEMENT *even_rows(const View &x) const { return x.data + b * x.batch + h * x.head; }
    // where its numbers begin in an array (batch, heads, queries)
    __device__ int64_t row(const Problem &p) const { return (int64_t(b) * p.groups * p.heads + h) * p.queries; }
    // and in one of statistics
    __device__ int64_t padded_row(const Problem &p) const {
        return (int64_t(b) * p.groups * p.heads + h) * ((p.queries + PADDED - 1) / PADDED * PADDED);
    }
    // whether dropout keeps a weight; a call of Philox for each, so it costs more than all else
    __device__ bool kept(const Problem &p, int t, int key) const {
        uint64_t element = p.first + b * p.by_batch + h * p.by_head + t * p.by_query + key;
        return dropout_factors<1>(p.draw, element).at[0] > 0.0f;
    }
};

// What this block does. Heads come in lots that share the L2 cache; within one, the tile changes slowest and the
// longest come first (of causal queries the last, `descending`), so that short ones fill the gaps at the end.
// `heads`: those of a group for a tile of queries; for one of keys 1, and then work begins with the group's first head.
__device__ __forceinline__ Work work_of(const Problem &p, int heads, int tiles, bool descending) {
    const int lot = p.close * heads, number = blockIdx.x / (lot * tiles), place = blockIdx.x % (lot * tiles);
    const int some = min(lot, p.batch * p.groups * heads - number * lot);
    const int head = number * lot + place % some, tile = place / some, b = head / (p.groups * heads);
    const int g = head / heads - b * p.groups;
    return {b, g * p.heads + head % heads, g, descending ? tiles - 1 - tile : tile};
}
