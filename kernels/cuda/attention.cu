// Attention without tensor cores, for any element type and any head width up to HEAD: mlm_mpi/ops/attention.py.
//
// A block of 16 x 16 threads holds a tile of queries (or of keys) and goes over the tiles of the other side; thread
// (x, y) owns rows y, y + 16, … and columns x, x + 16, … of every product. Softmax is kept up to date tile by tile
// (Dao et al., arXiv:2205.14135). Backward computes the probabilities twice, once for dq and once for dk and dv, so
// that every sum belongs to one block and has one order.
//
// SHARED: positions come in shares (Problem::share), of which ranks that pass keys round in a ring have one each: a
// query's softmax and its dq are summed over one share of keys after another, dk and dv over one share of queries after
// another (of all heads of a group in ascending order), each from zero; what comes of a share is then added. It takes
// registers, so it is a build of its own.
#include "attention.cuh"

constexpr int SIDE = 16;
constexpr int TILE = HEAD > 64 ? 32 : 64;  // queries, and keys, at a time
constexpr int EACH = TILE / SIDE;          // rows and columns of a score tile a thread owns
constexpr int WIDE = HEAD / SIDE;          // columns of the head it owns
constexpr int LINE = HEAD + 4;             // floats from row to row: 16-byte reads down 8 rows then hit all 32 banks
constexpr int SCORES = TILE + 4;
constexpr int THREADS = SIDE * SIDE;

__device__ __forceinline__ int column() { return threadIdx.x % SIDE; }
__device__ __forceinline__ int row() { return threadIdx.x / SIDE; }

// Over the 16 threads that share a row.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int distance = SIDE / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

__device__ __forceinline__ float row_max(float x) {
#pragma unroll
    for (int distance = SIDE / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}

// Rows first … first + TILE − 1 as floats; beyond `count` rows and beyond the head's width zeros.
__device__ __forceinline__ void load_tile(
    const ELEMENT *rows, int64_t stride, int first, int count, int width, float *tile) {
    for (int i = threadIdx.x; i < TILE * HEAD; i += THREADS) {
        int r = i / HEAD, c = i % HEAD;
        bool there = first + r < count && c < width;
        tile[r * LINE + c] = there ? to_float(rows[(first + r) * stride + c]) : 0.0f;
    }
}

// of queries `first` … `first` + TILE − 1; zeros beyond `count`
__device__ __forceinline__ void load_statistics(const Statistics *head, int first, int count, Statistics *to) {
    int t = first + threadIdx.x;
    if (threadIdx.x < TILE) to[threadIdx.x] = t < count ? head[t] : Statistics{};
}

// left rightᵀ of two tiles of rows
__device__ __forceinline__ void multiply(const float *left, const float *right, float (&out)[EACH][EACH]) {
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < EACH; j++) out[i][j] = 0.0f;
#pragma unroll 4
    for (int c = 0; c < HEAD; c += 4) {
        float4 a[EACH], b[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            a[i] = *reinterpret_cast<const float4 *>(left + (row() + i * SIDE) * LINE + c);
            b[i] = *reinterpret_cast<const float4 *>(right + (column() + i * SIDE) * LINE + c);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int j = 0; j < EACH; j++)
                out[i][j] += a[i].x * b[j].x + a[i].y * b[j].y + a[i].z * b[j].z + a[i].w * b[j].w;
    }
}

// sum += weights rows, of a TILE x TILE matrix and a tile of rows
__device__ __forceinline__ void accumulate(const float *weights, const float *rows, float (&sum)[EACH][WIDE]) {
#pragma unroll 4
    for (int k = 0; k < TILE; k++) {
        float weight[EACH], value[WIDE];
#pragma unroll
        for (int i = 0; i < EACH; i++) weight[i] = weights[(row() + i * SIDE) * SCORES + k];
#pragma unroll
        for (int c = 0; c < WIDE; c++) value[c] = rows[k * LINE + column() + c * SIDE];
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int c = 0; c < WIDE; c++) sum[i][c] += weight[i] * value[c];
    }
}

__device__ __forceinline__ void store_tile(
    const float (&sum)[EACH][WIDE], const float (&factor)[EACH], ELEMENT *rows, int64_t stride, int first, int count,
    int width) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int r = first + row() + i * SIDE;
#pragma unroll
        for (int c = 0; c < WIDE; c++)
            if (r < count && column() + c * SIDE < width)
                rows[r * stride + column() + c * SIDE] = from_float<ELEMENT>(sum[i][c] * factor[i]);
    }
}

// Where the tile of the share of keys begins that has the first key that anybody sees.
__device__ __forceinline__ int first_tile(int share, int key) { return share + max(0, key - share) / TILE * TILE; }

// all += sum of a share
__device__ __forceinline__ void join(float (&all)[EACH][WIDE], const float (&sum)[EACH][WIDE]) {
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int c = 0; c < WIDE; c++) all[i][c] = SHARED ? all[i][c] + sum[i][c] : sum[i][c];
}

__device__ __forceinline__ float factor_of(const Problem &p, const Work &work, int t, int key) {
    return work.kept(p, t, key) ? p.draw.factor : 0.0f;
}

// Of a thread's rows: the highest score so far, its part of the sum of weights relative to that, its columns of the
// weighed values.
struct Online {
    float top[EACH], total[EACH] = {}, sum[EACH][WIDE] = {};

    __device__ __forceinline__ Online() {
#pragma unroll
        for (int i = 0; i < EACH; i++) top[i] = -INFINITY_F;
    }
    // what scores of row i are relative to from now on
    __device__ __forceinline__ float rise(int i, float highest) {
        float base = highest == -INFINITY_F ? 0.0f : highest;  // −∞ − −∞ is no number
        float change = exp2f(top[i] - base);
        top[i] = highest;
        total[i] *= change;
#pragma unroll
        for (int c = 0; c < WIDE; c++) sum[i][c] *= change;
        return base;
    }
    __device__ __forceinline__ void join(const Online &other) {
        if constexpr (!SHARED) {
            *this = other;
        } else {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                float change = exp2f(other.top[i] - rise(i, fmaxf(top[i], other.top[i])));
                total[i] += other.total[i] * change;
#pragma unroll
                for (int c = 0; c < WIDE; c++) sum[i][c] += other.sum[i][c] * change;
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_forward(
    Problem p, View q, View k, View v, View o, float *lse) {
    DYNAMIC_SMEM(float, queries);
    float *keys = queries + TILE * LINE, *values = keys + TILE * LINE, *weights = values + TILE * LINE;
    const Work work = work_of(p, p.heads, (p.queries + TILE - 1) / TILE, true);
    const int first = work.tile * TILE, length = p.length(work.b);
    const int begin = p.start(work.b, first), end = p.limit(min(first + TILE, p.queries) - 1, length);
    Online all;
    load_tile(work.rows(q), q.row, first, p.queries, p.width, queries);

    int share = SHARED ? begin / p.share * p.share : 0;
    do {
        const int stop = SHARED ? min(end, share + p.share) : end;
        Online online;
        for (int key = first_tile(share, begin); key < stop; key += TILE) {
            load_tile(work.rows(k), k.row, key, stop, p.width, keys);
            load_tile(work.rows(v), v.row, key, stop, p.width, values);
            __syncthreads();
            float score[EACH][EACH];
            multiply(queries, keys, score);
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int limit = p.limit(first + row() + i * SIDE, SHARED ? stop : length);
                int start = p.start(work.b, first + row() + i * SIDE);
                float highest = online.top[i];
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    bool seen = key + column() + j * SIDE < limit && key + column() + j * SIDE >= start;
                    score[i][j] = seen ? score[i][j] * p.scale_2() : -INFINITY_F;
                    highest = fmaxf(highest, score[i][j]);
                }
                float base = online.rise(i, row_max(highest));
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    float weight = exp2f(score[i][j] - base);
                    online.total[i] += weight;
                    if (DROPOUT) weight *= factor_of(p, work, first + row() + i * SIDE, key + column() + j * SIDE);
                    weights[(row() + i * SIDE) * SCORES + column() + j * SIDE] = weight;
                }
            }
            __syncthreads();
            accumulate(weights, values, online.sum);
            __syncthreads();
        }
        all.join(online);
    } while (SHARED && (share += p.share) < end);

    float factor[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        float total = row_sum(all.total[i]);
        int t = first + row() + i * SIDE;
        factor[i] = total == 0.0f ? 0.0f : 1.0f / total;  // who sees no key
        if (column() == 0 && t < p.queries) lse[work.row(p) + t] = all.top[i] / LOG2_E + logf(total);
    }
    store_tile(all.sum, factor, work.even_rows(o), o.row, first, p.queries, p.width);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_backward_queries(
    Problem p, View dout, View q, View k, View v, const Statistics *statistics, View dq) {
    DYNAMIC_SMEM(float, queries);
    float *slopes = queries + TILE * LINE, *keys = slopes + TILE * LINE, *values = keys + TILE * LINE;
    float *weights = values + TILE * LINE;
    Statistics *levels = reinterpret_cast<Statistics *>(weights + TILE * SCORES);
    const Work work = work_of(p, p.heads, (p.queries + TILE - 1) / TILE, true);
    const int first = work.tile * TILE, length = p.length(work.b);
    const int begin = p.start(work.b, first), end = p.limit(min(first + TILE, p.queries) - 1, length);
    float all[EACH][WIDE] = {};
    load_tile(work.rows(q), q.row, first, p.queries, p.width, queries);
    load_tile(work.even_rows(dout), dout.row, first, p.queries, p.width, slopes);
    load_statistics(statistics + work.padded_row(p), first, p.queries, levels);

    int share = SHARED ? begin / p.share * p.share : 0;
    do {
        const int stop = SHARED ? min(end, share + p.share) : end;
        float sum[EACH][WIDE] = {};
        for (int key = first_tile(share, begin); key < stop; key += TILE) {
            load_tile(work.rows(k), k.row, key, stop, p.width, keys);
            load_tile(work.rows(v), v.row, key, stop, p.width, values);
            __syncthreads();
            float score[EACH][EACH], slope[EACH][EACH];
            multiply(queries, keys, score);
            multiply(slopes, values, slope);
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int r = row() + i * SIDE, limit = p.limit(first + r, SHARED ? stop : length);
                int start = p.start(work.b, first + r);
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    bool seen = key + column() + j * SIDE < limit && key + column() + j * SIDE >= start;
                    float weight = seen ? exp2f(score[i][j] * p.scale_2() - levels[r].level) : 0.0f;
                    if (DROPOUT) slope[i][j] *= factor_of(p, work, first + r, key + column() + j * SIDE);
                    weights[r * SCORES + column() + j * SIDE] = weight * (slope[i][j] - levels[r].delta);
                }
            }
            __syncthreads();
            accumulate(weights, keys, sum);
            __syncthreads();
        }
        join(all, sum);
    } while (SHARED && (share += p.share) < end);
    float factor[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) factor[i] = p.scale;
    store_tile(all, factor, work.rows(dq), dq.row, first, p.queries, p.width);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_backward_keys(
    Problem p, View dout, View q, View k, View v, const Statistics *statistics, View dk, View dv) {
    DYNAMIC_SMEM(float, keys);
    float *values = keys + TILE * LINE, *queries = values + TILE * LINE, *slopes = queries + TILE * LINE;
    float *weights = slopes + TILE * LINE;  // then what bends the scores: 99 KiB are all that some chips have
    Statistics *levels = reinterpret_cast<Statistics *>(weights + TILE * SCORES);
    Work work = work_of(p, 1, (p.keys + TILE - 1) / TILE, false);
    const int first = work.tile * TILE, length = p.length(work.b);
    const int end = p.last_query(work.b, first + TILE), group = work.h;
    int begin = first < length ? p.first_query(first) : p.queries;  // hidden keys: no query
    float all_dkey[EACH][WIDE] = {}, all_dvalue[EACH][WIDE] = {};
    load_tile(work.rows(k), k.row, first, length, p.width, keys);
    load_tile(work.rows(v), v.row, first, length, p.width, values);

    do {
        const int stop = SHARED ? min(end, p.share_end(begin)) : end;
        float dkey[EACH][WIDE] = {}, dvalue[EACH][WIDE] = {};
        work.h = group;
        for (int query = begin; query < stop && work.h < group + p.heads;) {  // one head after another
            load_tile(work.rows(q), q.row, query, stop, p.width, queries);
            load_tile(work.even_rows(dout), dout.row, query, stop, p.width, slopes);
            load_statistics(statistics + work.padded_row(p), query, stop, levels);
            __syncthreads();
            float score[EACH][EACH], slope[EACH][EACH];  // rows are keys, columns queries
            multiply(keys, queries, score);
            multiply(values, slopes, slope);
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int r = row() + i * SIDE;
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    int t = column() + j * SIDE;
                    bool seen = query + t < stop && first + r < p.limit(query + t, length) &&
                                first + r >= p.start(work.b, query + t);
                    float weight = seen ? exp2f(score[i][j] * p.scale_2() - levels[t].level) : 0.0f;
                    float kept = DROPOUT ? factor_of(p, work, query + t, first + r) : 1.0f;
                    weights[r * SCORES + t] = weight * kept;
                    slope[i][j] = weight * (slope[i][j] * kept - levels[t].delta);
                }
            }
            __syncthreads();
            accumulate(weights, slopes, dvalue);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++) weights[(row() + i * SIDE) * SCORES + column() + j * SIDE] = slope[i][j];
            __syncthreads();
            accumulate(weights, queries, dkey);
            __syncthreads();
            query += TILE;
            if (query >= stop) query = begin, work.h++;
        }
        join(all_dkey, dkey);
        join(all_dvalue, dvalue);
        begin = stop;
    } while (SHARED && begin < end);
    float factor[EACH], one[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) factor[i] = p.scale, one[i] = 1.0f;
    store_tile(all_dkey, factor, work.rows(dk), dk.row, first, p.keys, p.width);
    store_tile(all_dvalue, one, work.rows(dv), dv.row, first, p.keys, p.width);
}
