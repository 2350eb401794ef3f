// Owns how blocks of one launch see what others wrote: loads that no cache answers, and signals.
#pragma once
#include "common.cuh"

// About half a microsecond each.
#define SPINS_MAX 8000000u

/** 16 bytes as they are in L2: another multiprocessor may have written them in this launch. */
__device__ __forceinline__ uint4 loadFresh(const void* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ u32 freshWord(const void* p) {
  u32 v;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ float2 freshPair(const float2* p) {
  float2 v;
  asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ bf16 freshBf16(const bf16* p) {
  bf16 v;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
  return v;
}

/** By one thread, after a barrier of its block: what the block wrote is there. */
__device__ __forceinline__ void arrive(u32* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

/** As `arrive`, and what those before wrote is seen, too. @returns how many these are */
__device__ __forceinline__ u32 arriveAfter(u32* counter) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before) : "l"(counter) : "memory");
  return before;
}

/** What those who arrived before this value wrote is seen. */
__device__ __forceinline__ u32 acquire(const u32* counter) {
  u32 seen;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  return seen;
}

/** The copy engine sees what ordinary stores to global memory wrote, on both sides of a signal. */
__device__ __forceinline__ void seeForCopies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}
