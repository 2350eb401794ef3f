// Owns the table that a decode step in one kernel follows, who computes which rows of a phase, and
// how a phase waits for the one before it.
//
// Before: -D TOKENS WARPS HEADS KV_HEADS HEAD_DIM
#pragma once
#include "rope.cuh"
#include "signals.cuh"
#include "tensor-core.cuh"

#define STORE 0      // out[t][row] = y, bf16
#define ADD 1        // out[t][row] += y, bf16
#define GLU 2        // rows are [gate | up]: out[t][i] = act(gate[i])·up[i], bf16
#define LOGITS 3     // out[t][row] = y, float32
#define ROPE 4       // rows are [q | k | v]: q is rotated into out, k too and v into the slot
#define ATTENTION 5  // of the queries `in`, over each token's slot; no weights

#define THREADS (32 * WARPS)

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

/**
 * The block waits until `count` have arrived. All blocks run at once (the launch is cooperative),
 * so this ends; if it should not within seconds, the kernel fails and the driver says so.
 */
__device__ __forceinline__ void await(const u32* counter, u32 count) {
  if (threadIdx.x == 0) {
    for (u32 spins = 0; acquire(counter) < count; spins++) {
      if (spins == SPINS_MAX) __trap();
    }
  }
  __syncthreads();
}
