// Owns the few instructions that attention kernels share, under names that say what they do.

#pragma once

#include "async-copy.cuh"

typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr float LOG2E = 1.4426950408889634f;
#define NONE __int_as_float(0xff800000)  // minus infinity

/** What the driver encodes for the copy engine. */
struct __align__(64) TensorMap {
  u64 opaque[16];
};

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

/** Two floats as bf16, the first in the low half. */
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
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

__device__ __forceinline__ void prefetchMap(const TensorMap *map) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
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
