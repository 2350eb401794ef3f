// Owns the pieces that sampling is made of: a sequence's parameters, order-preserving keys, weights
// in fixed point, Philox, sums and searches over a block. Weights are integers (2^40 for the
// likeliest token), so sums are exact and a token never depends on the order of threads.
#pragma once
#include "common.cuh"

#define SAMPLE_THREADS 1024
#define WEIGHT_ONE 1099511627776.0f  // 2^40: 2^18 tokens sum to less than 2^58

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

/** Larger floats have larger keys. */
__device__ __forceinline__ u32 keyOf(float x) {
  u32 bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float ofKey(u32 key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

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

/** The block's sum in every thread. `scratch` holds 32. */
__device__ inline u64 blockSum64(u64 x, u64* scratch) {
  x = warpSum64(x);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
  __syncthreads();
  return warpSum64(scratch[threadIdx.x & 31]);
}

__device__ __forceinline__ u64 warpMax64(u64 x) {
  for (int d = 16; d; d >>= 1) {
    u64 other = __shfl_xor_sync(~0u, x, d);
    x = other > x ? other : x;
  }
  return x;
}

__device__ inline u64 blockMax64(u64 x, u64* scratch) {
  x = warpMax64(x);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
  __syncthreads();
  return warpMax64(scratch[threadIdx.x & 31]);
}

__device__ inline double blockSumDouble(double x, u64* scratch) {
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = __double_as_longlong(x);
  __syncthreads();
  x = __longlong_as_double(scratch[threadIdx.x & 31]);
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

/**
 * The largest key at which the masses of all keys not below it reach `target`: one bit a round.
 * `at(i, key, mass)` gives the i-th of `count` entries. A target beyond the total gives 0.
 */
template <typename At>
__device__ u32 reach(int count, u64 target, At at, u64* scratch) {
  u32 found = 0;
  for (u32 bit = 0x80000000u; bit; bit >>= 1) {
    u64 sum = 0;
    for (int i = threadIdx.x; i < count; i += SAMPLE_THREADS) {
      u32 key;
      u64 mass;
      at(i, key, mass);
      if (key >= (found | bit)) sum += mass;
    }
    if (blockSum64(sum, scratch) >= target) found |= bit;
  }
  return found;
}
