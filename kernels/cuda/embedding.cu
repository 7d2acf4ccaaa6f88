// Rows of a table by index, and the sum of gradients of equal indices: mlm_mpi/ops/embedding.py.
#include "common.cuh"

// A block of (32, rows at a time) threads keeps to WIDTH columns a lane. An id outside the table gives NaN, which the
// loss will show.
extern "C" __global__ void embedding_forward(
    const int32_t *ids, const ELEMENT *table, ELEMENT *out, int64_t count, int vocabulary, int columns) {
    int64_t column = (int64_t(blockIdx.x) * 32 + threadIdx.x) * WIDTH, step = int64_t(gridDim.y) * blockDim.y;
    if (column >= columns) return;
    for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < count; row += step) {
        int id = ids[row];
        Pack<float, WIDTH> value;
        for (float &each : value.at) each = NAN_F;
        if (unsigned(id) < unsigned(vocabulary)) value = load<WIDTH>(table + int64_t(id) * columns + column);
        store(out + row * columns + column, value);
    }
}

// Backward: positions sorted by id (stable) are cut into chunks of CHUNK. A warp sums the rows of one chunk in 32 WIDTH
// columns; a run of equal ids inside a chunk joins the table at once. A run that crosses a border leaves one part in
// every chunk it touches: `tails` where it begins, `heads` in the chunks it goes on to; embedding_join adds them in
// order. Only one warp ever writes an element, and the cuts depend on the ids alone.
constexpr int CHUNK = 32;
constexpr int AHEAD = 8;  // rows in flight

// This warp's chunk and columns
struct Place {
    int64_t chunk, first;
    int column, here;  // `here` positions from `first`

    __device__ __forceinline__ Place(int64_t count, int columns) {
        int strips = (columns + 32 * WIDTH - 1) / (32 * WIDTH);
        int64_t unit = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
        chunk = unit / strips, first = chunk * CHUNK;
        column = (int(unit % strips) * 32 + threadIdx.x) * WIDTH;
        here = first < count ? int(min(int64_t(CHUNK), count - first)) : 0;
    }
};

// The ids at two neighbouring places of the order, seen by the later one
__device__ __forceinline__ bool goes_on(const int32_t *ids, const int64_t *order, int64_t at, int64_t count) {
    return at > 0 && at < count && ids[order[at]] == ids[order[at - 1]];
}

__device__ __forceinline__ void add_to(float *p, const Pack<float, WIDTH> &x) {
    auto sum = load<WIDTH>(p);
    for (int i = 0; i < WIDTH; i++) sum.at[i] += x.at[i];
    store(p, sum);
}

extern "C" __global__ void embedding_backward(
    const ELEMENT *dy, const int32_t *ids, const int64_t *order, float *table, float *heads, float *tails,
    int64_t count, int vocabulary, int columns) {
    Place place(count, columns);
    if (place.here == 0) return;
    int lane = threadIdx.x;
    int64_t position = lane < place.here ? order[place.first + lane] : 0;
    int id = ids[position];
    bool came = goes_on(ids, order, place.first, count), leaves = goes_on(ids, order, place.first + place.here, count);
    bool inside = place.column < columns;
    Pack<float, WIDTH> sum = {};
    for (int k = 0; k < place.here; k += AHEAD) {
        Pack<ELEMENT, WIDTH> rows[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            int64_t from = __shfl_sync(~0u, position, k + a);
            if (inside && k + a < place.here) rows[a] = load_raw<WIDTH>(dy + from * columns + place.column);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            int now = __shfl_sync(~0u, id, k + a), next = __shfl_sync(~0u, id, (k + a + 1) % 32);
            if (k + a >= place.here) continue;
            bool last = k + a == place.here - 1;
            if (inside) {
                for (int i = 0; i < WIDTH; i++) sum.at[i] += to_float(rows[a].at[i]);
            }
            if (!last && next == now) continue;
            float *part = came ? heads : last && leaves ? tails : nullptr;
            if (inside && part) store(part + place.chunk * columns + place.column, sum);
            if (inside && !part && unsigned(now) < unsigned(vocabulary)) {
                add_to(table + int64_t(now) * columns + place.column, sum);
            }
            came = false, sum = {};
        }
    }
}

extern "C" __global__ void embedding_join(
    const int32_t *ids, const int64_t *order, float *table, const float *heads, const float *tails, int64_t count,
    int vocabulary, int columns) {
    Place place(count, columns);
    int64_t end = place.first + place.here, chunks = (count + CHUNK - 1) / CHUNK;
    if (place.here == 0 || !goes_on(ids, order, end, count)) return;
    int id = ids[order[end]];
    bool earlier = goes_on(ids, order, place.first, count) && ids[order[place.first]] == id;
    if (earlier || unsigned(id) >= unsigned(vocabulary)) return;
    int column = min(place.column, columns - WIDTH);  // lanes behind the last column help to search
    auto sum = load<WIDTH>(tails + place.chunk * columns + column);
    for (int64_t next = place.chunk + 1;; next += 32) {
        int64_t asked = next + threadIdx.x;
        bool same = asked < chunks && ids[order[asked * CHUNK]] == id;
        int length = __ffs(~__ballot_sync(~0u, same)) - 1;  // chunks in a row that the run goes on to; -1: all 32
        int parts = length < 0 ? 32 : length;
#pragma unroll 8
        for (int part = 0; part < parts; part++) {
            auto head = load<WIDTH>(heads + (next + part) * columns + column);
            for (int i = 0; i < WIDTH; i++) sum.at[i] += head.at[i];
        }
        if (parts < 32) break;
    }
    if (place.column < columns) add_to(table + int64_t(id) * columns + column, sum);
}
