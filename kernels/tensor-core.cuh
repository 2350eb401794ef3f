// Owns the few instructions that attention kernels share, under names that say what they do.

#pragma once

#include "common.cuh"

constexpr float LOG2E = 1.4426950408889634f;
#define NONE __int_as_float(0xff800000)  // minus infinity

/** What the driver encodes for the copy engine. */
struct __align__(64) TensorMap {
  u64 opaque[16];
};

/** Where something in shared memory lies, as instructions take it. */
__device__ __forceinline__ u32 address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

/** Four 8 × 8 matrices of bf16; each lane gives the address of one row of 16 bytes. */
__device__ __forceinline__ void loadMatrices(u32 (&r)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void loadTransposed(u32 (&r)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}

/** c [16, 8] += a [16, 16] · b [16, 8], in the fragments of mma.m16n8k16. */
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

/** cap · tanh(x / cap) for x in units of log2 e; tanh(y) = 1 - 2 / (1 + e^2y). */
__device__ __forceinline__ float softCap(float x, float cap) {
  return cap * LOG2E * (1 - 2 / (1 + exp2(x * 2 / cap)));
}

__device__ __forceinline__ void barrierInit(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrierArrive(u32 barrier) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrierWait(u32 barrier, u32 parity) {
#if __CUDA_ARCH__ >= 900
#define TEST_WAIT "mbarrier.try_wait.parity.shared.b64"
#else
#define TEST_WAIT "mbarrier.test_wait.parity.shared.b64"
#endif
  u32 done;
  do {
    asm volatile("{ .reg .pred p; " TEST_WAIT " p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  } while (!done);
}

#if __CUDA_ARCH__ >= 900
/** Arrives, and lets the barrier wait for `bytes` of bulk copies, too. */
__device__ __forceinline__ void barrierExpect(u32 barrier, u32 bytes) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared.b64 t, [%0], %1; }" ::"r"(barrier),
               "r"(bytes) : "memory");
}

/**
 * Copies a box of a tensor of four dimensions. What lies outside of it becomes zeros, but not
 * without the tensor's first address being touched.
 */
__device__ __forceinline__ void loadBox(u32 to, const void *map, int x, int y, int z, int w,
                                        u32 barrier) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(z),
               "r"(w), "r"(barrier) : "memory");
}
#endif

__device__ __forceinline__ void copy16(u32 to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void prefetchMap(const TensorMap *map) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

/** Other threads and the copy engine see barriers that were initialised. */
__device__ __forceinline__ void barriersReady() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  __syncthreads();
}

/**
 * In a programmatic launch: waits for the kernel before this one, then lets the next be set up.
 * Nothing in an ordinary one.
 */
__device__ __forceinline__ void awaitPredecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
