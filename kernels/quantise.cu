// Owns what turns rows of bf16 into rows of e4m3 and a scale each, one block a row: weights when
// they are loaded, attention's output in every step. Moves 3 bytes an element: 64 × 4,096 is
// 0.8 MB, launch-bound. Error: half of e4m3's last bit, 2^-4 of an element, or 2^-10 of its row's
// scale below 2^-6 of that. Oracle: test/cuda/fp8.gpu.ts.
#include "fp8.cuh"

#define PER_THREAD 4  // groups of 8 that a thread keeps: width ≤ 1024 · 8 · 4

/** in: rows of `width` bf16, a multiple of 8; out: as many e4m3; scales: one a row. */
extern "C" __global__ void __launch_bounds__(1024)
    quantiseRows(const bf16* in, e4m3* out, bf16* scales, int width) {
  __shared__ float scratch[33];
  awaitInputs();
  releaseDependents();
  u64 at = (u64)blockIdx.x * width;
  int count = width >> 3;
  float v[PER_THREAD][8];
#pragma unroll
  for (int c = 0; c < PER_THREAD; c++) {
    int i = threadIdx.x + c * blockDim.x;
    if (i >= count) continue;
    unpack8(((const uint4*)(in + at))[i], v[c]);
  }
  storeE4m3<PER_THREAD>(v, count, out + at, scales + blockIdx.x, scratch);
}

/**
 * out[token][row] (+)= raw[token][row] · scales, 8 matrix rows a thread and a token a y: where
 * nothing scales a product that reads it anyway. raw may be out.
 */
extern "C" __global__ void __launch_bounds__(256)
    scaleProduct(const bf16* raw, const bf16* rowScales, const bf16* tokenScales, bf16* out,
                 int rows, int rawStride, int stride, int accumulate) {
  awaitInputs();
  releaseDependents();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows >> 3) return;
  uint4* to = (uint4*)(out + (u64)blockIdx.y * stride) + i;
  float v[8];
  unpack8(((const uint4*)(raw + (u64)blockIdx.y * rawStride))[i], v);
  scale8(v, ((const uint4*)rowScales)[i], widen(tokenScales[blockIdx.y]));
  if (accumulate) {
    float old[8];
    unpack8(*to, old);
    for (int j = 0; j < 8; j++) v[j] += old[j];
  }
  *to = pack8(v);
}
