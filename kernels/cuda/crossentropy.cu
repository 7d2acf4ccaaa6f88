// Softmax and cross-entropy of rows of logits, the gradient in their place: mlm_mpi/ops/crossentropy.py.
//
// A block takes a row. The first read finds maximum and sum together (Milakov, Gimelshein, arXiv:1805.02867), of each of
// `shares` equal parts of the row by itself and in an order that no address changes: whoever has that part only finds
// the same two. Then sums are brought to the row's maximum and join in a tree. The second read goes backwards, so that
// it begins with what the caches saw last.
#include "tree.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int WIDTH = 16 / sizeof(ELEMENT);
constexpr int MOST_SHARES = 64;
constexpr float LOWEST = -3.402823466e38f;  // instead of -inf: a logit of -inf minus it is no NaN

// The soft cap of the logits where there is one (CAP): cap tanh(z / cap), with a slope of 1 - (l / cap)^2 at l.
struct Cap {
    float cap, inverse;

    __device__ __forceinline__ float of(float z) const {
        if constexpr (!CAP) return z;
        float x = z * inverse, size = fabsf(x), square = x * x;
        float p = -5.70498872745e-3f;  // below 0.625: an odd polynomial (Cephes, S. Moshier)
        p = p * square + 2.06390887954e-2f;
        p = p * square - 5.37397155531e-2f;
        p = p * square + 1.33314422036e-1f;
        p = p * square - 3.33332819422e-1f;
        float far = copysignf(1.0f - __fdividef(2.0f, __expf(2.0f * size) + 1.0f), x);
        return cap * (size < 0.625f ? x + x * square * p : far);
    }
    __device__ __forceinline__ float slope(float l) const {
        if constexpr (!CAP) return 1.0f;
        float part = l * inverse;
        return 1.0f - part * part;
    }
};

// A row of any alignment: elements before the first 16-byte line, packs, elements behind the last pack
struct Row {
    ELEMENT *at;
    int columns, head, packs, tail;

    __device__ __forceinline__ Row(ELEMENT *row, int columns) : at(row), columns(columns) {
        int before = int(-reinterpret_cast<uint64_t>(row) & 15) / int(sizeof(ELEMENT));
        head = min(before, columns), packs = (columns - head) / WIDTH, tail = head + packs * WIDTH;
    }
    template <class Work> __device__ __forceinline__ void forwards(Work &work) const {
        ends(work);
        for (int p = threadIdx.x; p < packs; p += THREADS) {
            work.template take<WIDTH>(at + head + p * WIDTH);
        }
    }
    template <class Work> __device__ __forceinline__ void backwards(Work &work) const {
        for (int p = packs - 1 - int(threadIdx.x); p >= 0; p -= THREADS) {
            work.template take<WIDTH>(at + head + p * WIDTH);
        }
        ends(work);
    }
    template <class Work> __device__ __forceinline__ void ends(Work &work) const {
        if (threadIdx.x < head) work.template take<1>(at + threadIdx.x);
        if (tail + threadIdx.x < columns) work.template take<1>(at + tail + threadIdx.x);
    }
};

// The largest logit so far, and the sum of exp(logit - largest)
struct Online {
    Cap cap;
    float largest = LOWEST, sum = 0.0f;

    template <int N> __device__ __forceinline__ void take(Pack<float, N> x) {
        for (float &each : x.at) each = cap.of(each);
        float top = largest;
        for (float each : x.at) top = fmaxf(top, each);
        sum *= __expf(largest - top), largest = top;
        for (float each : x.at) sum += __expf(each - top);
    }
    __device__ __forceinline__ void over(const ELEMENT *part, int length) {
        int packs = length / WIDTH, left = packs * WIDTH + threadIdx.x;
        if (left < length) take(Pack<float, 1>{to_float(part[left])});
        if (reinterpret_cast<uint64_t>(part) % 16 == 0) {
            for (int p = threadIdx.x; p < packs; p += THREADS) take<WIDTH>(load<WIDTH>(part + p * WIDTH));
        } else {
            for (int p = threadIdx.x; p < packs; p += THREADS) {
                Pack<float, WIDTH> x;
#pragma unroll
                for (int i = 0; i < WIDTH; i++) x.at[i] = to_float(part[p * WIDTH + i]);
                take<WIDTH>(x);
            }
        }
    }
};

struct Softmax {
    Cap cap;
    float largest, scale;

    template <int N> __device__ __forceinline__ void take(ELEMENT *p) const {
        auto x = load<N>(p);
        for (float &each : x.at) {
            float l = cap.of(each);
            each = __expf(l - largest) * scale;
            if constexpr (CAP) each *= cap.slope(l);
        }
        store(p, x);
    }
};

struct Zero {
    template <int N> __device__ __forceinline__ void take(ELEMENT *p) const { store(p, Pack<float, N>{}); }
};

__device__ __forceinline__ float block_max(float x) {
    __shared__ float parts[WARPS];
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    for (float part : parts) x = fmaxf(x, part);
    return x;
}

// A masked row has loss 0 and gradient 0. A target that is no column makes the loss NaN and reads nothing. `most`: the
// cap, not 0, with CAP.
extern "C" __global__ void __launch_bounds__(THREADS, 1536 / THREADS) crossentropy_rows(
    ELEMENT *logits, const int32_t *targets, const bool *mask, double *losses, int64_t stride, int columns,
    int gradient, int shares, float most) {
    __shared__ float tops[MOST_SHARES], sums[MOST_SHARES], waiting[TREE_LEVELS], total;
    Row row(logits + int64_t(blockIdx.x) * stride, columns);
    if (mask && !mask[blockIdx.x]) {
        Zero zero;
        row.forwards(zero);
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.0;
        return;
    }
    int target = targets[blockIdx.x];
    bool known = unsigned(target) < unsigned(columns);
    Cap cap{most, 1.0f / most};
    float wanted = known ? cap.of(to_float(row.at[target])) : NAN_F;
    float largest = LOWEST;
    for (int share = 0, length = columns / shares; share < shares; share++) {
        Online online{cap};
        online.over(row.at + share * length, length);
        float top = block_max(online.largest);
        float sum = group_sum<WARPS>(online.sum * __expf(online.largest - top));
        largest = fmaxf(largest, top);
        if (threadIdx.x == 0) tops[share] = top, sums[share] = sum;
    }
    if (threadIdx.x == 0) {
        Tree<float, 1> tree{waiting};
        for (int share = 0; share < shares; share++) tree.add(sums[share] * __expf(tops[share] - largest));
        total = tree.sum();
    }
    __syncthreads();
    float sum = total;
    if (threadIdx.x == 0) losses[blockIdx.x] = double(logf(sum)) - (double(wanted) - double(largest));
    if (!gradient) return;
    Softmax softmax{cap, largest, 1.0f / sum};
    row.backwards(softmax);  // every thread has `wanted`: they have waited for each other
    __syncthreads();
    if (threadIdx.x == 0 && known) {
        float off = __expf(wanted - largest) * softmax.scale - 1.0f;
        row.at[target] = from_float<ELEMENT>(CAP ? off * cap.slope(wanted) : off);
    }
}
