// The second half of a product whose sum over k comes in shares, each of them a product of its own in float32: the tree
// that joins them, and the epilogue. Memory-bound: reads every sum of a share once.
#include "matmul.cuh"
#include "tree.cuh"

constexpr int THREADS = 128, COUNT = 4;

// Shapes: sums (count, m, pitch_sums), the pitch a multiple of COUNT. A thread has COUNT neighbours of a row.
extern "C" __global__ void __launch_bounds__(THREADS) matmul_shares(
    const float *sums, int m, int n, int pitch_sums, int count, RESULT *out, int pitch, int accumulate,
    const ELEMENT *bias, const ELEMENT *other) {
    __shared__ Floats<COUNT> waiting[TREE_LEVELS][THREADS];
    int64_t place = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * COUNT;
    int2 at = make_int2(place / pitch_sums, place % pitch_sums);
    if (at.x >= m) return;
    Tree<Floats<COUNT>, THREADS> tree{&waiting[0][threadIdx.x]};
    for (int share = 0; share < count; share++, place += int64_t(m) * pitch_sums)
        tree.add(*reinterpret_cast<const Floats<COUNT> *>(sums + place));
    Floats<COUNT> sum = tree.sum();
    Result result{out, bias, other, nullptr, pitch, m, n, accumulate};
    result.finish<COUNT, 1>([&](int) { return at; }, [&](int) { return sum; });
}
