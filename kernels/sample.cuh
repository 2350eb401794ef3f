// Owns the pieces that sampling is made of: a sequence's parameters, order-preserving keys, weights
// in fixed point, Philox, sums over a warp. Weights are integers (2^40 for the likeliest token), so
// sums are exact, and a token depends neither on the order of threads nor on how many share a row.
#pragma once
#include "common.cuh"

#define SAMPLE_THREADS 1024
#define WARPS (SAMPLE_THREADS / 32)
#define WEIGHT_ONE 1099511627776.0f  // 2^40: 2^18 tokens sum to less than 2^58
#define NOTHING_BEYOND 27.8f         // nats from the maximum: e^-27.8 is less than 2^-40
#define LOG2_E 1.44269504f
#define LEAST_KEY 0x007fffffu        // of -Infinity

/** As src/backends/cuda/sampling.ts writes it, 96 bytes a slot. float64, as the CPU has them. */
struct Sampling {
  /** 0 is greedy. */
  double temperature;
  double topP, minP, typicalP;
  double repetition, presence, frequency;
  int topK, biases;
  u32 seedLow, seedHigh;
  /** Draws so far: the counter of the generator. */
  u64 drawn;
  /** Whether tokens are counted: any of the three penalties is on. */
  int penalised;
  /** Likeliest tokens to report; -1 for no log-probabilities at all. */
  int logprobs;
  u64 unused;
};

/** Larger floats have larger keys; the two zeros are one. */
__device__ __forceinline__ u32 keyOf(float x) {
  int bits = __float_as_int(x + 0.f);
  return bits ^ (bits >> 31 | 0x80000000);
}
__device__ __forceinline__ float ofKey(u32 key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/** A token as a number that is larger for larger logits and, of equal ones, lower ids. */
__device__ __forceinline__ u64 entryOf(float x, int id) {
  return (u64)keyOf(x) << 32 | (0xffffffffu - id);
}
__device__ __forceinline__ int idOf(u64 entry) { return (int)(0xffffffffu - (u32)entry); }
__device__ __forceinline__ float logitOf(u64 entry) { return ofKey((u32)(entry >> 32)); }

/** The larger; NaN if one is that. */
__device__ __forceinline__ float maxOrNan(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

/** 2^x, 0 for what would be less than 2^-126; as __expf has it, but for that. */
__device__ __forceinline__ float exp2Fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/** How far logits are from the largest, in nats once the temperature has been applied. */
struct Scale {
  float max, inverse;
  /** Rounded before anything is subtracted from it: the same wherever it is asked for. */
  __device__ __forceinline__ float distance(float x) const { return __fmul_rn(max - x, inverse); }

  /**
   * (u64)(e^-distance · 2^40). Conversions to 64 bits run at an eighth of the rate of additions, so
   * 20 bits at a time are rounded down by adding 2^23.
   */
  __device__ __forceinline__ u64 weight(float x) const {
    float e = exp2Fast(distance(x) * -LOG2_E);
    float upper = __fmaf_rz(e, 1048576.f, 8388608.f);
    float rest = __fmaf_rn(e, 1048576.f, 8388608.f - upper);
    float lower = __fmaf_rz(rest, 1048576.f, 8388608.f);
    return (u64)(__float_as_uint(upper) - 0x4b000000u) * 1048576u +
           (__float_as_uint(lower) - 0x4b000000u);
  }
};

/** Philox4x32-10 (Salmon et al. 2011), as src/engine/sampler-random.ts: draw n in [0, 1). */
__device__ inline double uniform(u32 key0, u32 key1, u64 n) {
  u32 c0 = (u32)n, c1 = (u32)(n >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; round++) {
    u32 high0 = __umulhi(0xd2511f53u, c0), low0 = 0xd2511f53u * c0;
    u32 high1 = __umulhi(0xcd9e8d57u, c2), low1 = 0xcd9e8d57u * c2;
    c0 = high1 ^ c1 ^ key0, c1 = low1, c2 = high0 ^ c3 ^ key1, c3 = low0;
    key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
  }
  return ((double)(c0 >> 5) * 67108864.0 + (double)(c1 >> 6)) / 9007199254740992.0;
}

__device__ __forceinline__ u64 warpSum64(u64 x) {
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

__device__ __forceinline__ u64 warpMax64(u64 x) {
  for (int d = 16; d; d >>= 1) {
    u64 other = __shfl_xor_sync(~0u, x, d);
    x = other > x ? other : x;
  }
  return x;
}

/** Of lanes 0 to this one. */
__device__ __forceinline__ u64 warpPrefix64(u64 x) {
  for (int d = 1; d < 32; d <<= 1) {
    u64 other = __shfl_up_sync(~0u, x, d);
    if ((threadIdx.x & 31) >= d) x += other;
  }
  return x;
}
