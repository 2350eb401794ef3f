// Owns copies into shared memory that run by themselves, and the barriers that say when they have
// arrived, under names that say what they do (PTX ISA, "Asynchronous copy", "mbarrier").
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

/** Where something in shared memory lies, as instructions take it. */
__device__ __forceinline__ u32 address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

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

/** Copies `bytes` (a multiple of 16) that are read once: they leave L2 first. */
__device__ __forceinline__ void copyOnce(u32 to, const void *from, u32 bytes, u32 barrier) {
#ifdef PLAIN
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
  return;
#endif
  asm volatile("{ .reg .b64 p; createpolicy.fractional.L2::evict_first.b64 p, 1.0;"
               "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1], %2, [%3], p; }" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
#endif

__device__ __forceinline__ void copy16(u32 to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

/** Other threads and the copy engine see barriers that were initialised. */
__device__ __forceinline__ void barriersReady() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  __syncthreads();
}
