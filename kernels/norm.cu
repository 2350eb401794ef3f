// Owns RMS norms and the sums around them, one block a row: bf16 in and out, float32 inside; or
// e4m3 out, rounded once.
// Zhang & Sennrich 2019, arXiv:1910.07467. Moves 2–5 rows of 2·width bytes: launch-bound for a
// decode batch (2–3 µs), bandwidth-bound for a prefill. Relative error 2^-8. Oracle:
// test/cuda/elementwise.gpu.ts.
#include "evens.cuh"
#include "fp8.cuh"

#define PER_THREAD 4  // groups of 8 that a thread keeps: width ≤ 1024 · 8 · 4

/**
 * One row, after an optional sum. x: the residual stream; added: what a block computed.
 *   postWeight null: x' = x + added     else x' = x + norm(added)·postWeight
 *   added null: x' = x;   out null: only the sum is wanted;   x is written if there was a sum.
 * GROUPS: of 8 elements that a thread keeps; NARROW: between products of e4m3; EVENS: a row of bf16
 *   that lies as evens.cuh says.
 */
template <bool NARROW, int GROUPS, bool EVENS = false>
__device__ __forceinline__ void norm(bf16* x, const bf16* added, const float* postWeight,
                                     const float* weight, void* out, int width, float eps,
                                     bf16* outScales, Scales scales) {
  // Weights are asked for before the sum is there, where registers allow it.
  constexpr bool EARLY = NARROW && GROUPS == 1;
  __shared__ float scratch[33];
  // At once: a product that follows asks for its first weights while this waits for its row.
  releaseDependents();
  awaitInputs();
  u64 at = (u64)blockIdx.x * width;
  int count = width >> 3;
  float v[GROUPS][8];
  const uint4* by = NARROW ? (const uint4*)scales.rows : nullptr;
  float token = by ? widen(scales.tokens[blockIdx.x]) : 1.f;
  float post = 0.f;
  if (added && postWeight) {
    for (int c = 0, i = threadIdx.x; c < GROUPS && i < count; c++, i += blockDim.x) {
      float a[8];
      unpack8(((const uint4*)(added + at))[i], a);
      if (by) scale8(a, by[i], token);
      for (int j = 0; j < 8; j++) post += a[j] * a[j];
    }
    post = rsqrtf(blockSum(post, scratch) / width + eps);
  }
  // All of it is asked for before any of it is waited for.
  uint4 raw[GROUPS];
#pragma unroll
  for (int c = 0; c < GROUPS; c++) {
    int i = threadIdx.x + c * blockDim.x;
    raw[c] = i < count ? ((const uint4*)(x + at))[i] : make_uint4(0, 0, 0, 0);
  }
  float sum = 0.f;
  float4 w[2];
#pragma unroll
  for (int c = 0; c < GROUPS; c++) {
    int i = threadIdx.x + c * blockDim.x;
    unpack8(raw[c], v[c]);
    if (added && i < count) {
      float a[8];
      unpack8(((const uint4*)(added + at))[i], a);
      if (by) scale8(a, by[i], token);
      for (int j = 0; j < 8; j++) {
        float term = postWeight ? rounded(a[j] * post * postWeight[i * 8 + j]) : a[j];
        v[c][j] = rounded(v[c][j] + term);
      }
      ((uint4*)(x + at))[i] = pack8(v[c]);
    }
    for (int j = 0; j < 8; j++) sum += v[c][j] * v[c][j];
    if (EARLY && out && i < count) {
      w[0] = ((const float4*)weight)[2 * i];
      w[1] = ((const float4*)weight)[2 * i + 1];
    }
  }
  if (!out) return;
  float scale = rsqrtf(blockSum(sum, scratch) / width + eps);
#pragma unroll
  for (int c = 0; c < GROUPS; c++) {
    int i = threadIdx.x + c * blockDim.x;
    if (i >= count) break;
    for (int j = 0; j < 8; j++) {
      v[c][j] *= scale * (EARLY ? ((const float*)w)[j] : weight[i * 8 + j]);
    }
    if (NARROW && outScales) continue;
    for (int j = 0; EVENS && j < 8; j++) v[c][j] *= EVENS_FACTOR;
    const uint4 row = pack8(v[c]);
    if (EVENS) storeEvens((bf16*)out + at, i, row);
    else ((uint4*)((bf16*)out + at))[i] = row;
  }
  if (!NARROW || !outScales) return;
  storeE4m3<GROUPS>(v, count, (e4m3*)out + at, outScales + blockIdx.x, scratch);
}

extern "C" __global__ void __launch_bounds__(1024)
    normRow(bf16* x, const bf16* added, const float* postWeight, const float* weight, bf16* out,
            int width, float eps) {
  norm<false, PER_THREAD>(x, added, postWeight, weight, out, width, eps, nullptr, {});
}

/** The same for a product of e4m3 in batch-step.cu; width is a multiple of 16. */
extern "C" __global__ void __launch_bounds__(1024)
    normRowEvens(bf16* x, const bf16* added, const float* postWeight, const float* weight,
                 bf16* out, int width, float eps) {
  norm<false, PER_THREAD, true>(x, added, postWeight, weight, out, width, eps, nullptr, {});
}

/**
 * The same between products of e4m3, width ≤ 1024 · 8. outScales: null for an out of bf16, else
 * out is e4m3 and each row has a scale; rowScales: null for an `added` of numbers, else of the
 * matrix that made it.
 */
extern "C" __global__ void __launch_bounds__(1024)
    normRowE4m3(bf16* x, const bf16* added, const float* postWeight, const float* weight,
                void* out, int width, float eps, bf16* outScales, const bf16* rowScales,
                const bf16* tokenScales) {
  norm<true, 1>(x, added, postWeight, weight, out, width, eps, outScales,
                {rowScales, tokenScales});
}

/** The same of wider rows. */
extern "C" __global__ void __launch_bounds__(1024)
    normRowE4m3Wide(bf16* x, const bf16* added, const float* postWeight, const float* weight,
                    void* out, int width, float eps, bf16* outScales, const bf16* rowScales,
                    const bf16* tokenScales) {
  norm<true, PER_THREAD>(x, added, postWeight, weight, out, width, eps, outScales,
                         {rowScales, tokenScales});
}
