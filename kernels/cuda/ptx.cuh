// Every inline-PTX instruction the kernels use, once, each with its CPU meaning (CU_CPU) beside it: emulator/*.h.
// Names and layouts: PTX ISA 8.8. Addresses of shared memory are generic pointers here; PTX takes 32-bit ones.
#pragma once

#ifndef CU_CPU
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
typedef unsigned long size_t;

struct __align__(64) CUtensorMap {  // as in cuda.h, which NVRTC need not see
    unsigned long long opaque[16];
};

// swizzles of 128 bytes repeat every 1024 bytes, counted from address 0
#define DYNAMIC_SMEM(T, name)                                     \
    extern __shared__ __align__(1024) unsigned char name##_raw[]; \
    T *name = reinterpret_cast<T *>(name##_raw)
#endif
#define INFINITY_F __int_as_float(0x7f800000)

__device__ __forceinline__ uint32_t smem_u32(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ---- arithmetic -------------------------------------------------------------------------------

// 2^x to 2 ulp; a result below the normal range is 0
__device__ __forceinline__ float exp2_approx(float x) {
#ifndef CU_CPU
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return cu::flush(exp2f(cu::flush(x)));
#endif
}

// two floats rounded to the nearest bfloat16 (even on a tie), the first in the low half
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#ifndef CU_CPU
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return cu::to_bf16(low) | uint32_t(cu::to_bf16(high)) << 16;
#endif
}

// ---- matrices of a warp -----------------------------------------------------------------------

// d[4] += a[4] (16x16 bf16, row) * b[2] (16x8 bf16, col)
__device__ __forceinline__ void mma_m16n8k16(float *d, const uint32_t *a, const uint32_t *b) {
#ifndef CU_CPU
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    cu::mma_m16n8k16(d, a, b);
#endif
}

// four 8x8 matrices of 16-bit elements into r[4]; lane i gives the address of row i % 8 of matrix i / 8
template <bool TRANS> __device__ __forceinline__ void ldmatrix_x4(uint32_t *r, const void *row) {
#ifndef CU_CPU
    if constexpr (TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(smem_u32(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(smem_u32(row))
                     : "memory");
#else
    cu::ldmatrix<4, TRANS>(r, row);
#endif
}

// two matrices into r[2]; the addresses of lanes 16 to 31 are not looked at
template <bool TRANS> __device__ __forceinline__ void ldmatrix_x2(uint32_t *r, const void *row) {
#ifndef CU_CPU
    if constexpr (TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(smem_u32(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(smem_u32(row))
                     : "memory");
#else
    cu::ldmatrix<2, TRANS>(r, row);
#endif
}

// the inverse of ldmatrix_x4 (sm_90 and up)
template <bool TRANS> __device__ __forceinline__ void stmatrix_x4(void *row, const uint32_t *r) {
#ifndef CU_CPU
    if constexpr (TRANS)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(smem_u32(row)),
                     "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                     : "memory");
    else
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(smem_u32(row)), "r"(r[0]),
                     "r"(r[1]), "r"(r[2]), "r"(r[3])
                     : "memory");
#else
    cu::stmatrix_x4<TRANS>(row, r);
#endif
}

// ---- asynchronous copies of a thread (sm_80 and up) -------------------------------------------

// 16 bytes to shared memory, or 16 zero bytes where `pred` is false (`src` is not read then)
__device__ __forceinline__ void cp_async16(void *dst, const void *src, bool pred = true) {
#ifndef CU_CPU
    int bytes = pred ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem_u32(dst)), "l"(src), "r"(bytes)
                 : "memory");
#else
    cu::cp_async16(dst, pred ? src : nullptr);
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifndef CU_CPU
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
    cu::cp_async_commit();
#endif
}

// until at most N of this thread's committed groups are under way
template <int N> __device__ __forceinline__ void cp_async_wait() {
#ifndef CU_CPU
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
#else
    cu::cp_async_wait(N);
#endif
}

// ---- barriers and registers -------------------------------------------------------------------

// barrier `id` (1 to 15; 0 is __syncthreads) of `threads` threads, a multiple of 32: wait for all of them
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
#ifndef CU_CPU
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#else
    cu::named_barrier(id, threads, true);
#endif
}

// be counted by such a barrier and go on
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
#ifndef CU_CPU
    asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#else
    cu::named_barrier(id, threads, false);
#endif
}

// true in one lane of a converged warp, no matter which
__device__ __forceinline__ bool elect_one() {
#ifndef CU_CPU
    int elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}\n" : "=r"(elected));
    return elected;
#else
    return cu::elect_one();
#endif
}

// every thread of the warpgroup now may use R registers; waits until other warpgroups have given them back
template <int R> __device__ __forceinline__ void setmaxnreg_inc() {
    static_assert(R % 8 == 0 && R >= 24 && R <= 256, "setmaxnreg: a multiple of 8 from 24 to 256");
#ifndef CU_CPU
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(R));
#else
    cu::setmaxnreg(R);
#endif
}

template <int R> __device__ __forceinline__ void setmaxnreg_dec() {
    static_assert(R % 8 == 0 && R >= 24 && R <= 256, "setmaxnreg: a multiple of 8 from 24 to 256");
#ifndef CU_CPU
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(R));
#else
    cu::setmaxnreg(R);
#endif
}

// ---- mbarrier (sm_90) -------------------------------------------------------------------------
// A phase ends when `count` arrivals and all expected bytes have come. The first phase has parity 0.

__device__ __forceinline__ void mbar_init(uint64_t *barrier, int count) {
#ifndef CU_CPU
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(smem_u32(barrier)), "r"(count) : "memory");
#else
    cu::mbar_init(barrier, count);
#endif
}

// after the inits, by the thread that made them, before the __syncthreads that publishes them
__device__ __forceinline__ void mbar_fence_init() {
#ifndef CU_CPU
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// one arrival, and `bytes` more to come in this phase
__device__ __forceinline__ void mbar_expect_tx(uint64_t *barrier, int bytes) {
#ifndef CU_CPU
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(smem_u32(barrier)), "r"(bytes)
                 : "memory");
#else
    cu::mbar_update(barrier, 1, bytes);
#endif
}

__device__ __forceinline__ void mbar_arrive(uint64_t *barrier) {
#ifndef CU_CPU
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(smem_u32(barrier)) : "memory");
#else
    cu::mbar_update(barrier, 1, 0);
#endif
}

// until the phase of this parity has ended
__device__ __forceinline__ void mbar_wait(uint64_t *barrier, int parity) {
#ifndef CU_CPU
    asm volatile(
        "{\n.reg .pred p;\nW: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra D;\nbra W;\nD:\n}\n" ::"r"(
            smem_u32(barrier)),
        "r"(parity)
        : "memory");
#else
    cu::mbar_wait(barrier, parity);
#endif
}

// ---- TMA: tiles between global and shared memory (sm_90) --------------------------------------
// One thread starts a copy of the map's box at coordinates x (innermost), y, z, w. A load counts its bytes at `barrier`;
// elements outside the tensor are loaded as 0 and not stored. x has to be a multiple of 16 bytes, also outside the tensor,
// and no coordinate of a store may be negative: else the GPU reports an illegal instruction.

__device__ __forceinline__ void tma_prefetch(const CUtensorMap *map) {
#ifndef CU_CPU
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
#endif
}

__device__ __forceinline__ void tma_load_2d(void *dst, const CUtensorMap *map, uint64_t *barrier, int x, int y) {
#ifndef CU_CPU
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n"
        ::"r"(smem_u32(dst)), "l"(map), "r"(smem_u32(barrier)), "r"(x), "r"(y)
        : "memory");
#else
    cu::tma_load(dst, map, barrier, {x, y});
#endif
}

__device__ __forceinline__ void tma_load_3d(void *dst, const CUtensorMap *map, uint64_t *barrier, int x, int y, int z) {
#ifndef CU_CPU
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];\n"
        ::"r"(smem_u32(dst)), "l"(map), "r"(smem_u32(barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
#else
    cu::tma_load(dst, map, barrier, {x, y, z});
#endif
}

__device__ __forceinline__ void tma_load_4d(void *dst, const CUtensorMap *map, uint64_t *barrier, int x, int y, int z,
                                            int w) {
#ifndef CU_CPU
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];\n"
        ::"r"(smem_u32(dst)), "l"(map), "r"(smem_u32(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
#else
    cu::tma_load(dst, map, barrier, {x, y, z, w});
#endif
}

// by every thread that wrote shared memory, before the barrier after which TMA or wgmma reads it
__device__ __forceinline__ void fence_proxy_async() {
#ifndef CU_CPU
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#else
    cu::fence_proxy_async();
#endif
}

__device__ __forceinline__ void tma_store_2d(const CUtensorMap *map, const void *src, int x, int y) {
#ifndef CU_CPU
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];\n" ::"l"(map),
                 "r"(smem_u32(src)), "r"(x), "r"(y)
                 : "memory");
#else
    cu::tma_store(map, src, {x, y});
#endif
}

__device__ __forceinline__ void tma_store_3d(const CUtensorMap *map, const void *src, int x, int y, int z) {
#ifndef CU_CPU
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];\n" ::"l"(map),
                 "r"(smem_u32(src)), "r"(x), "r"(y), "r"(z)
                 : "memory");
#else
    cu::tma_store(map, src, {x, y, z});
#endif
}

__device__ __forceinline__ void tma_store_4d(const CUtensorMap *map, const void *src, int x, int y, int z, int w) {
#ifndef CU_CPU
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(map),
                 "r"(smem_u32(src)), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
#else
    cu::tma_store(map, src, {x, y, z, w});
#endif
}

__device__ __forceinline__ void tma_store_commit() {
#ifndef CU_CPU
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
#else
    cu::tma_store_commit();
#endif
}

// until the shared memory of all but N of this thread's store groups has been read: needed before it is written again,
// and before the block ends
template <int N> __device__ __forceinline__ void tma_store_wait_read() {
#ifndef CU_CPU
    asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(N) : "memory");
#else
    cu::tma_store_wait(N, false);
#endif
}

// until all but N of them have been written
template <int N> __device__ __forceinline__ void tma_store_wait() {
#ifndef CU_CPU
    asm volatile("cp.async.bulk.wait_group %0;\n" ::"n"(N) : "memory");
#else
    cu::tma_store_wait(N, true);
#endif
}

// ---- wgmma: matrices of a warpgroup (sm_90a) --------------------------------------------------

// An operand that is contiguous along K, as TMA's 128-byte swizzle leaves a box of 64 bf16 (along K) by any number of rows:
// rows of 128 bytes, 8-row groups 1024 bytes apart. `p`: the first element, its tile aligned to 1024 bytes; the next 16
// along K are 32 bytes on.
__device__ __forceinline__ uint64_t smem_desc(const void *p) {
    return (smem_u32(p) & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// An operand that is contiguous along M or N, as the same swizzle leaves boxes of 64 bf16 (along M or N) by any number of
// K rows: one row of 128 bytes per k, groups of 8 k 1024 bytes apart, and the next 64 elements along M or N (the next box)
// `box_bytes` on. The next 16 along K are 2048 bytes on.
__device__ __forceinline__ uint64_t smem_desc_mn(const void *p, int box_bytes) {
    return (smem_u32(p) & 0x3ffff) >> 4 | uint64_t(box_bytes >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

// before the first wgmma, and again after registers it uses were touched
__device__ __forceinline__ void wgmma_fence() {
#ifndef CU_CPU
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#else
    cu::wgmma_fence();
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#ifndef CU_CPU
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#else
    cu::wgmma_commit();
#endif
}

// until at most N of this warpgroup's committed groups are under way
template <int N> __device__ __forceinline__ void wgmma_wait() {
#ifndef CU_CPU
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
#else
    cu::wgmma_wait(N);
#endif
}

// The assembler wants each accumulator by name and operand: lists that only the preprocessor can write.
#define WGMMA_FLOATS_8(i)                                                                                           \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_FLOATS_32(i) WGMMA_FLOATS_8(i), WGMMA_FLOATS_8(i + 8), WGMMA_FLOATS_8(i + 16), WGMMA_FLOATS_8(i + 24)
#define WGMMA_FLOATS_64(i) WGMMA_FLOATS_32(i), WGMMA_FLOATS_32(i + 32)
#define WGMMA_NAMES_32                                                                                          \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_64                                                                                            \
    WGMMA_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
                   "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NAMES_96                                                                                            \
    WGMMA_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
                   "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_NAMES_128                                                                                       \
    WGMMA_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
                   "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_TEXT(n, floats, operands, accumulate, transposed)                                                   \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\n"                                                       \
    "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" floats "}, " operands ", p, 1, 1, " transposed ";\n}\n"

// d (64 x N; N/2 floats a thread) = A (64 x 16) B (16 x N), added to d unless `accumulate` is false. A and B in shared memory:
// descriptors of smem_desc, or of smem_desc_mn where A_ALONG_M or B_ALONG_N is set. Row of d[i] in the warpgroup's 64: 16 * warp + lane / 4
// + i / 2 % 2 * 8; column: i / 4 * 8 + lane % 4 * 2 + i % 2.
template <int N, bool A_ALONG_M = false, bool B_ALONG_N = false>
__device__ __forceinline__ void wgmma(float *d, uint64_t a, uint64_t b, bool accumulate = true) {
    static_assert(N == 64 || N == 128 || N == 192 || N == 256, "wgmma: write the operand list of this N");
#ifndef CU_CPU
#define WGMMA_INPUTS "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(A_ALONG_M)), "n"(int(B_ALONG_N))
    if constexpr (N == 64)
        asm volatile(WGMMA_TEXT("64", WGMMA_NAMES_32, "%32, %33", "%34", "%35, %36")
                     : WGMMA_FLOATS_32(0)
                     : WGMMA_INPUTS);
    else if constexpr (N == 128)
        asm volatile(WGMMA_TEXT("128", WGMMA_NAMES_64, "%64, %65", "%66", "%67, %68")
                     : WGMMA_FLOATS_64(0)
                     : WGMMA_INPUTS);
    else if constexpr (N == 192)
        asm volatile(WGMMA_TEXT("192", WGMMA_NAMES_96, "%96, %97", "%98", "%99, %100")
                     : WGMMA_FLOATS_64(0), WGMMA_FLOATS_32(64)
                     : WGMMA_INPUTS);
    else
        asm volatile(WGMMA_TEXT("256", WGMMA_NAMES_128, "%128, %129", "%130", "%131, %132")
                     : WGMMA_FLOATS_64(0), WGMMA_FLOATS_64(64)
                     : WGMMA_INPUTS);
#undef WGMMA_INPUTS
#else
    cu::wgmma(d, N, cu::in_shared(a, A_ALONG_M), cu::in_shared(b, B_ALONG_N), accumulate);
#endif
}

// The same with A in registers: a[4] as mma_m16n8k16 wants it, each warp its 16 rows. They must not change before the wait.
template <int N, bool B_ALONG_N = false>
__device__ __forceinline__ void wgmma(float *d, const uint32_t *a, uint64_t b, bool accumulate = true) {
    static_assert(N == 64 || N == 128 || N == 192 || N == 256, "wgmma: write the operand list of this N");
#ifndef CU_CPU
#define WGMMA_INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(B_ALONG_N))
    if constexpr (N == 64)
        asm volatile(WGMMA_TEXT("64", WGMMA_NAMES_32, "{%32, %33, %34, %35}, %36", "%37", "%38")
                     : WGMMA_FLOATS_32(0)
                     : WGMMA_INPUTS);
    else if constexpr (N == 128)
        asm volatile(WGMMA_TEXT("128", WGMMA_NAMES_64, "{%64, %65, %66, %67}, %68", "%69", "%70")
                     : WGMMA_FLOATS_64(0)
                     : WGMMA_INPUTS);
    else if constexpr (N == 192)
        asm volatile(WGMMA_TEXT("192", WGMMA_NAMES_96, "{%96, %97, %98, %99}, %100", "%101", "%102")
                     : WGMMA_FLOATS_64(0), WGMMA_FLOATS_32(64)
                     : WGMMA_INPUTS);
    else
        asm volatile(WGMMA_TEXT("256", WGMMA_NAMES_128, "{%128, %129, %130, %131}, %132", "%133", "%134")
                     : WGMMA_FLOATS_64(0), WGMMA_FLOATS_64(64)
                     : WGMMA_INPUTS);
#undef WGMMA_INPUTS
#else
    cu::wgmma(d, N, cu::in_registers(a), cu::in_shared(b, B_ALONG_N), accumulate);
#endif
}

// ---- stores -----------------------------------------------------------------------------------
// 16 bytes to global memory by one instruction. NVRTC 13.0 splits the store of a 16-byte structure, float4 included,
// into four wherever the row of a matrix is a loop variable (seen in PTX for compute_90a).
__device__ __forceinline__ void store_global16(void *p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#ifndef CU_CPU
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(p)), "r"(a), "r"(b), "r"(c),
                 "r"(d) : "memory");
#else
    if ((uintptr_t)p & 15) cu::fail("st.global.v4: address not 16-byte aligned");
    uint32_t words[4] = {a, b, c, d};
    memcpy(p, words, 16);
#endif
}

// A store that adds to the float32 elements in global memory. Each is added to once, so the order of stores is no matter.
__device__ __forceinline__ void tma_add_2d(const CUtensorMap *map, const void *src, int x, int y) {
#ifndef CU_CPU
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];\n" ::"l"(map),
                 "r"(smem_u32(src)), "r"(x), "r"(y)
                 : "memory");
#else
    cu::tma_store(map, src, {x, y}, true);
#endif
}
