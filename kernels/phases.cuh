// Owns the table that a decode step in one kernel follows, who computes which rows of a phase, and
// how a phase waits for the one before it.
//
// Before: -D TOKENS WARPS HEADS KV_HEADS HEAD_DIM
#pragma once
#include "rope.cuh"
#include "tensor-core.cuh"

#define STORE 0      // out[t][row] = y, bf16
#define ADD 1        // out[t][row] += y, bf16
#define GLU 2        // rows are [gate | up]: out[t][i] = act(gate[i])·up[i], bf16
#define LOGITS 3     // out[t][row] = y, float32
#define ROPE 4       // rows are [q | k | v]: q is rotated into out, k too and v into the slot
#define ATTENTION 5  // of the queries `in`, over each token's slot; no weights

#define THREADS (32 * WARPS)
// About half a microsecond each.
#define SPINS_MAX 8000000u

/** As src/backends/cuda/decode-step.ts writes it: 80 bytes, read as 16 at a time. */
struct __align__(16) Phase {
  /** [rows, k] */
  const bf16* weight;
  /** [TOKENS, k] */
  const bf16* in;
  /** k weights of the norm before the product; null for none. */
  const float* norm;
  void* out;
  /** Bytes from a token's start to the layer's keys. */
  u64 layerOffset;
  int kind, rows, k, outStride, gelu, dimensions, interleaved;
  float eps;
  /** Tokens that a query sees, itself included. */
  int window;
  /** Of the phase before, that this one waits for. */
  u32 arrivals;
};
static_assert(sizeof(Phase) == 80, "the host writes phases");

/** Which rows an item of a phase needs together. */
struct Items {
  int kind, rows, dimensions, interleaved;

  __device__ __forceinline__ explicit Items(const Phase& p)
      : kind(p.kind), rows(p.rows), dimensions(p.dimensions), interleaved(p.interleaved) {}

  __device__ __forceinline__ bool pairs() const { return kind == GLU || kind == ROPE; }

  __device__ __forceinline__ int count() const {
    return kind == ATTENTION ? 0 : pairs() ? rows >> 1 : rows;
  }

  __device__ __forceinline__ int2 rowsOf(int item) const {
    if (kind == GLU) return make_int2(item, item + (rows >> 1));
    if (kind != ROPE) return make_int2(item, item);
    constexpr int PAIRS = HEAD_DIM / 2;
    const int head = item / PAIRS;
    if (head >= HEADS + KV_HEADS) return make_int2(2 * item, 2 * item + 1);
    const int2 at = pairOf({nullptr, dimensions, interleaved, 1.f}, item - head * PAIRS);
    return make_int2(head * HEAD_DIM + at.x, head * HEAD_DIM + at.y);
  }
};

/**
 * A step's counters: by phase, how many blocks have done their part; behind these, for
 * weight-stream.cuh. There are two sets, so that a step clears the next one's: `all` is the number
 * of steps so far, three unused words, and the sets.
 */
__device__ __forceinline__ u32* countersOf(u32* all, u32 step, int count) {
  return all + 4 + (step & 1) * 2 * count;
}

/** 16 bytes as they are in L2: another multiprocessor may have written them in this launch. */
__device__ __forceinline__ uint4 loadFresh(const void* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
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

/**
 * The block waits until `count` have arrived. All blocks run at once (the launch is cooperative),
 * so this ends; if it should not within seconds, the kernel fails and the driver says so.
 */
__device__ __forceinline__ void await(const u32* counter, u32 count) {
  if (threadIdx.x == 0) {
    u32 seen;
    for (u32 spins = 0;; spins++) {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      if (seen >= count) break;
      if (spins == SPINS_MAX) __trap();
    }
  }
  __syncthreads();
}
