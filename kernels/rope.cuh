// Owns the rotation of a pair by its position (Su et al. 2021, arXiv:2104.09864) and where the two
// elements of a pair lie in a head; shared by the kernels that rotate.
#pragma once
#include "common.cuh"

struct Rope {
  /** Radians a position, by pair: base, scaling and divisors are in it already. */
  const float* frequencies;
  /** Dimensions that turn; those after them stay. */
  int dimensions;
  /** 1: pairs (2i, 2i+1); 0: pairs (i, i + dimensions/2). */
  int interleaved;
  /** What sine and cosine are multiplied by (YaRN's attention factor). */
  float magnitude;
};

/** Elements of pair `p` of a head of `headDim`; pairs after the turning ones are neighbours. */
__device__ __forceinline__ int2 pairOf(const Rope& rope, int p) {
  int half = rope.dimensions >> 1;
  if (p >= half || rope.interleaved) return make_int2(2 * p, 2 * p + 1);
  return make_int2(p, p + half);
}

/** Cosine and sine by which pair `p` turns at a position; a pair that stays turns by nothing. */
__device__ __forceinline__ float2 turnOf(const Rope& rope, int p, int position) {
  if (p >= rope.dimensions >> 1) return make_float2(1.f, 0.f);
  float sine, cosine;
  sincosf(position * rope.frequencies[p], &sine, &cosine);
  return make_float2(cosine * rope.magnitude, sine * rope.magnitude);
}

__device__ __forceinline__ void turn(float2 by, float& a, float& b) {
  float x = a * by.x - b * by.y;
  b = a * by.y + b * by.x;
  a = x;
}

__device__ __forceinline__ void rotate(const Rope& rope, int p, int position, float& a, float& b) {
  if (p < rope.dimensions >> 1) turn(turnOf(rope, p, position), a, b);
}
