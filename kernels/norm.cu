// Owns RMS norms and the sums around them, one block a row: bf16 in and out, float32 inside.
// Zhang & Sennrich 2019, arXiv:1910.07467. Moves 2–5 rows of 2·width bytes: launch-bound for a
// decode batch (2–3 µs), bandwidth-bound for a prefill. Relative error 2^-8. Oracle:
// test/cuda/elementwise.gpu.ts.
#include "common.cuh"

#define PER_THREAD 4  // uint4s of a row that a thread keeps: width ≤ 1024 · 8 · 4

/**
 * One row, after an optional sum. x: the residual stream; added: what a block computed.
 *   postWeight null: x' = x + added     else x' = x + norm(added)·postWeight
 *   added null: x' = x;   out null: only the sum is wanted;   x is written if there was a sum.
 */
extern "C" __global__ void __launch_bounds__(1024)
    normRow(bf16* x, const bf16* added, const float* postWeight, const float* weight, bf16* out,
            int width, float eps) {
  __shared__ float scratch[33];
  // At once: a product that follows asks for its first weights while this waits for its row.
  releaseDependents();
  awaitInputs();
  u64 at = (u64)blockIdx.x * width;
  int count = width >> 3;
  float v[PER_THREAD][8];
  float post = 0.f;
  if (added && postWeight) {
    for (int c = 0, i = threadIdx.x; c < PER_THREAD && i < count; c++, i += blockDim.x) {
      float a[8];
      unpack8(((const uint4*)(added + at))[i], a);
      for (int j = 0; j < 8; j++) post += a[j] * a[j];
    }
    post = rsqrtf(blockSum(post, scratch) / width + eps);
  }
  // All of it is asked for before any of it is waited for.
  uint4 raw[PER_THREAD];
#pragma unroll
  for (int c = 0; c < PER_THREAD; c++) {
    int i = threadIdx.x + c * blockDim.x;
    raw[c] = i < count ? ((const uint4*)(x + at))[i] : make_uint4(0, 0, 0, 0);
  }
  float sum = 0.f;
#pragma unroll
  for (int c = 0; c < PER_THREAD; c++) {
    int i = threadIdx.x + c * blockDim.x;
    unpack8(raw[c], v[c]);
    if (added && i < count) {
      float a[8];
      unpack8(((const uint4*)(added + at))[i], a);
      for (int j = 0; j < 8; j++) {
        float term = postWeight ? rounded(a[j] * post * postWeight[i * 8 + j]) : a[j];
        v[c][j] = rounded(v[c][j] + term);
      }
      ((uint4*)(x + at))[i] = pack8(v[c]);
    }
    for (int j = 0; j < 8; j++) sum += v[c][j] * v[c][j];
  }
  if (!out) return;
  float scale = rsqrtf(blockSum(sum, scratch) / width + eps);
#pragma unroll
  for (int c = 0; c < PER_THREAD; c++) {
    int i = threadIdx.x + c * blockDim.x;
    if (i >= count) break;
    for (int j = 0; j < 8; j++) v[c][j] *= scale * weight[i * 8 + j];
    ((uint4*)(out + at))[i] = pack8(v[c]);
  }
}
