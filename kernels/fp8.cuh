// Owns rows of e4m3, numbers of 8 bits with 4 of exponent and 3 of mantissa (Micikevicius et al.
// 2022, arXiv:2209.05433), and the bf16 that each row is scaled by: a product's row is read again
// with as many bytes of scales. Before compute capability 8.9 there is no such conversion, and
// whoever asks for one traps.
#pragma once
#include "common.cuh"

typedef unsigned char e4m3;
#define E4M3_MAX 448.f
#define SMALLEST 1.17549435e-38f  // whose inverse is a number, too
/** How a product of e4m3 becomes numbers: by a scale of each matrix row and one of each token. */
struct Scales {
  /** Null for a product that is numbers already. */
  const bf16* rows;
  const bf16* tokens;
};

/** Scales 8 elements of a token's product by those of as many rows of the matrix. */
__device__ __forceinline__ void scale8(float* v, uint4 rows, float token) {
  float by[8];
  unpack8(rows, by);
  for (int j = 0; j < 8; j++) v[j] *= by[j] * token;
}

/** Four floats rounded to nearest even, beyond ±448 to that; a goes to the lowest byte. */
__device__ __forceinline__ u32 packE4m3(float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
  unsigned short low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return low | (u32)high << 16;
#else
  __trap();
  return 0;
#endif
}

/** The block's largest in every thread; `scratch` holds 33 floats. */
__device__ __forceinline__ float blockMax(float x, float* scratch) {
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = (blockDim.x + 31) >> 5;
  x = warpMax(x);
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  float most = scratch[0];
  for (int i = 1; i < warps; i++) most = fmaxf(most, scratch[i]);
  return most;
}

/**
 * Writes a row that the block's threads hold 8 elements each at a time, thread i those from
 * 8·(i + c·blockDim.x) on, and its scale: the largest is 444 to 448 of it.
 * GROUPS: of 8 elements that a thread holds; count: of such groups in the row.
 */
template <int GROUPS>
__device__ __forceinline__ void storeE4m3(const float (*v)[8], int count, e4m3* out, bf16* scale,
                                          float* scratch) {
  float most = 0.f;
#pragma unroll
  for (int c = 0; c < GROUPS; c++) {
    if (threadIdx.x + c * blockDim.x >= count) continue;
    for (int j = 0; j < 8; j++) most = fmaxf(most, fabsf(v[c][j]));
  }
  most = blockMax(most, scratch);
  // Rounded up: nothing is beyond 448.
  u32 bits = __float_as_uint(fmaxf(most / E4M3_MAX, SMALLEST)) + 0xffff;
  float inverse = 1.f / __uint_as_float(bits & 0xffff0000u);
  if (threadIdx.x == 0) *scale = (bf16)(bits >> 16);
#pragma unroll
  for (int c = 0; c < GROUPS; c++) {
    int i = threadIdx.x + c * blockDim.x;
    if (i >= count) continue;
    float x[8];
    for (int j = 0; j < 8; j++) x[j] = v[c][j] * inverse;
    ((uint2*)out)[i] =
        make_uint2(packE4m3(x[0], x[1], x[2], x[3]), packE4m3(x[4], x[5], x[6], x[7]));
  }
}
