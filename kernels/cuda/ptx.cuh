// Every inline-PTX instruction the kernels use, once, each with its CPU meaning beside it (CU_CPU).
#pragma once
#define INFINITY_F __int_as_float(0x7f800000)
#ifndef CU_CPU
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
typedef unsigned long size_t;
#define DYNAMIC_SMEM(T, name) extern __shared__ __align__(1024) unsigned char name##_raw[]; T *name = reinterpret_cast<T *>(name##_raw)
__device__ __forceinline__ uint32_t smem_u32(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
#endif

// d[4] += a[4] (16x16 bf16, row) * b[2] (16x8 bf16, col)
__device__ __forceinline__ void mma_m16n8k16(float *d, const uint32_t *a, const uint32_t *b) {
#ifndef CU_CPU
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  struct In { uint32_t a[4], b[2]; float d[4]; } in; memcpy(in.a, a, 16); memcpy(in.b, b, 8); memcpy(in.d, d, 16);
  auto *o = cu::collective(~0u, &in, sizeof in, "mma.sync.m16n8k16", [](cu::Group &g, int p) {
    float A[16][16], Bt[16][8], C[16][8] = {};
    auto bf = [](uint32_t w, int h) { unsigned u = h ? w & 0xffff0000u : w << 16; float f; memcpy(&f, &u, 4); return f; };
    for (int l = 0; l < 32; l++) {
      const In &s = *(const In *)g.in[p][l]; int r = l / 4, c = l % 4 * 2;
      for (int h = 0; h < 2; h++) {
        A[r][c + h] = bf(s.a[0], h); A[r + 8][c + h] = bf(s.a[1], h); A[r][c + 8 + h] = bf(s.a[2], h); A[r + 8][c + 8 + h] = bf(s.a[3], h);
        Bt[c + h][r] = bf(s.b[0], h); Bt[c + 8 + h][r] = bf(s.b[1], h);
      }
    }
    for (int i = 0; i < 16; i++) for (int k = 0; k < 16; k++) for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * Bt[k][j];
    for (int l = 0; l < 32; l++) {
      const In &s = *(const In *)g.in[p][l]; float *q = (float *)g.out[p][l]; int r = l / 4, c = l % 4 * 2;
      q[0] = s.d[0] + C[r][c]; q[1] = s.d[1] + C[r][c + 1]; q[2] = s.d[2] + C[r + 8][c]; q[3] = s.d[3] + C[r + 8][c + 1];
    } });
  memcpy(d, o, 16);
#endif
}
// four 8x8 b16 matrices; lane i gives the address of row i%8 of matrix i/8
template <bool TRANS> __device__ __forceinline__ void ldmatrix_x4(uint32_t *r, const void *row) {
#ifndef CU_CPU
  if (TRANS) asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_u32(row)) : "memory");
  else asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_u32(row)) : "memory");
#else
  if ((uintptr_t)row & 15) CU_DIE("ldmatrix: row address not 16-byte aligned");
  auto *o = cu::collective(~0u, &row, sizeof row, "ldmatrix", [](cu::Group &g, int p) {
    for (int m = 0; m < 4; m++) for (int l = 0; l < 32; l++) for (int h = 0; h < 2; h++) {
      int i = TRANS ? l % 4 * 2 + h : l / 4, j = TRANS ? l / 4 : l % 4 * 2 + h;
      const unsigned short *q; memcpy(&q, g.in[p][m * 8 + i], sizeof q);
      ((unsigned short *)g.out[p][l])[m * 2 + h] = q[j];
    } });
  memcpy(r, o, 16);
#endif
}
// 16-byte asynchronous copy to shared memory; on the CPU it lands at the wait (late as can be) or at once, by seed
__device__ __forceinline__ void cp_async16(void *dst, const void *src, bool pred = true) {
#ifndef CU_CPU
  int n = pred ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem_u32(dst)), "l"(src), "r"(n) : "memory");
#else
  if (((uintptr_t)dst | (uintptr_t)src) & 15) CU_DIE("cp.async: address not 16-byte aligned");
  cu::CpAsync::Copy c{dst, pred ? src : nullptr};
  { cu::Quiet s; cu::cp_async[cu::cur->lin].open.push_back(c); }
  if (cu::eager()) cu::CpAsync::run(c);
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#ifndef CU_CPU
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  cu::Quiet s; cu::CpAsync &q = cu::cp_async[cu::cur->lin]; q.groups.push_back(std::move(q.open)); q.open.clear();
#endif
}
template <int N> __device__ __forceinline__ void cp_async_wait() {
#ifndef CU_CPU
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
#else
  cu::CpAsync::wait(N);
#endif
}
// two floats rounded to the nearest bfloat16 (even on a tie), the first in the low half
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#ifndef CU_CPU
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    auto round = [](float value) {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fffu;  // NaN
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
#endif
}

// ---- Hopper: mbarrier, TMA, wgmma --------------------------------------------------------------
#ifndef CU_CPU
struct __align__(64) CUtensorMap { unsigned long long opaque[16]; };   // as in cuda.h, which NVRTC need not see
#endif
__device__ __forceinline__ void mbar_init(uint64_t *b, int count) {
#ifndef CU_CPU
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(smem_u32(b)), "r"(count) : "memory");
#else
  cu::mbar_init(b, count);
#endif
}
__device__ __forceinline__ void mbar_fence_init() {
#ifndef CU_CPU
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void mbar_expect_tx(uint64_t *b, int bytes) {   // one arrival, and `bytes` more to come
#ifndef CU_CPU
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(smem_u32(b)), "r"(bytes) : "memory");
#else
  cu::mbar_update(b, 1, bytes);
#endif
}
__device__ __forceinline__ void mbar_arrive(uint64_t *b) {
#ifndef CU_CPU
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(smem_u32(b)) : "memory");
#else
  cu::mbar_update(b, 1, 0);
#endif
}
__device__ __forceinline__ void mbar_wait(uint64_t *b, int parity) {
#ifndef CU_CPU
  asm volatile("{\n.reg .pred p;\nW: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra D;\nbra W;\nD:\n}\n" ::"r"(smem_u32(b)), "r"(parity) : "memory");
#else
  cu::mbar_wait(b, parity);
#endif
}
__device__ __forceinline__ void tma_load_2d(void *dst, const CUtensorMap *map, uint64_t *bar, int x, int y) {
#ifndef CU_CPU
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n"
               ::"r"(smem_u32(dst)), "l"(map), "r"(smem_u32(bar)), "r"(x), "r"(y) : "memory");
#else
  cu::tma_load_2d(dst, map, bar, x, y);
#endif
}
// K-major operand in shared memory as TMA's 128-byte swizzle leaves it: rows of 64 bf16, 8-row groups 1024 bytes apart
__device__ __forceinline__ uint64_t smem_desc(const void *p) {
#ifdef CU_CPU
  uint64_t a = __cvta_generic_to_shared(p);
#else
  uint64_t a = smem_u32(p);
#endif
  return (a & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
__device__ __forceinline__ void wgmma_fence() {
#ifndef CU_CPU
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#ifndef CU_CPU
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#else
  cu::wgmma_commit();
#endif
}
template <int N> __device__ __forceinline__ void wgmma_wait() {
#ifndef CU_CPU
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
#else
  cu::wgmma_wait(N);
#endif
}
template <int R> __device__ __forceinline__ void setmaxnreg_inc() {
#ifndef CU_CPU
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(R));
#endif
}
template <int R> __device__ __forceinline__ void setmaxnreg_dec() {
#ifndef CU_CPU
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(R));
#endif
}
// d[64] += A (64x16) B (128x16)^T, both K-major in shared memory
__device__ __forceinline__ void wgmma_m64n128k16(float *d, uint64_t da, uint64_t db) {
#ifndef CU_CPU
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;\n}\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) : "l"(da), "l"(db));
#else
  cu::wgmma(d, da, db, 128);
#endif
}

// ---- Stores ------------------------------------------------------------------------------------
// 16 bytes to global memory by one instruction. NVRTC 13.0 splits the store of a 16-byte structure, float4 included, into
// four wherever the row of a matrix is a loop variable (seen in PTX for sm_80, sm_90a, sm_100).
__device__ __forceinline__ void store_global16(void *p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#ifndef CU_CPU
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(p)), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
#else
    if ((uintptr_t)p & 15) CU_DIE("st.global.v4: address not 16-byte aligned");
    uint32_t words[4] = {a, b, c, d};
    memcpy(p, words, 16);
#endif
}
