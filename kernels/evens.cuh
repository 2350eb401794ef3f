// Owns the order that tokens' elements lie in for a product that reads e4m3 with ldmatrix
// (batch-e4m3.cuh): of 16, those at even places and then those at odd ones; and what they are
// multiplied by.
#pragma once
#include "common.cuh"

/** Weights are 2^-120 of themselves there: sums are numbers that float32 has in full. */
constexpr float EVENS_FACTOR = 18446744073709551616.f;  // 2^64

/**
 * Lanes 4·i … 4·i + 3 have 8 neighbours, two each: they end with pairs of the same order, to lie at
 * `evensPlace` of the 16, or two further on if these are the second 8.
 */
__device__ __forceinline__ u32 evensApart(u32 pair) {
  const u32 other = __shfl_xor_sync(~0u, pair, 1);
  return __byte_perm(pair, other, threadIdx.x & 1 ? 0x3276 : 0x5410);
}

/** In pairs, from the 16 elements' first. */
__device__ __forceinline__ int evensPlace() {
  return threadIdx.x % 2 * 4 + threadIdx.x % 4 / 2;
}

/** Group i of 8 elements of a row. */
__device__ __forceinline__ void storeEvens(bf16* row, int i, uint4 group) {
  uint2* to = (uint2*)(row + i / 2 * 16) + i % 2;
  to[0] = make_uint2(__byte_perm(group.x, group.y, 0x5410), __byte_perm(group.z, group.w, 0x5410));
  to[2] = make_uint2(__byte_perm(group.x, group.y, 0x7632), __byte_perm(group.z, group.w, 0x7632));
}
