// Owns gated activations: out = act(gate)·up for rows [gate | up] of 2·width bf16 (Shazeer 2020,
// arXiv:2002.05202). Moves 6·width bytes a token: 64 × 14,336 is 5.5 MB, 1.8 µs at 3 TB/s. One
// rounding. Oracle: test/cuda/elementwise.gpu.ts.
#include "fp8.cuh"

extern "C" __global__ void __launch_bounds__(256)
    glu(const bf16* in, bf16* out, int width, int gelu) {
  awaitInputs();
  releaseDependents();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  u64 row = blockIdx.y;
  if (i >= width >> 3) return;
  const uint4* from = (const uint4*)(in + row * 2 * width);
  float gate[8], up[8];
  unpack8(from[i], gate);
  unpack8(from[i + (width >> 3)], up);
  for (int j = 0; j < 8; j++) gate[j] = activate(gate[j], gelu) * up[j];
  ((uint4*)(out + row * width))[i] = pack8(gate);
}

#define PER_THREAD 4  // groups of 8 that a thread keeps: width ≤ 1024 · 8 · 4

/**
 * The same between products of e4m3, one block a row. outScales: null for an out of bf16, else out
 * is e4m3 and each row has a scale; rowScales: null for an input of numbers, else of its matrix.
 */
extern "C" __global__ void __launch_bounds__(1024)
    gluE4m3(const bf16* in, void* out, int width, int gelu, bf16* outScales,
            const bf16* rowScales, const bf16* tokenScales) {
  __shared__ float scratch[33];
  awaitInputs();
  releaseDependents();
  int count = width >> 3;
  const uint4* from = (const uint4*)(in + (u64)blockIdx.x * 2 * width);
  float token = rowScales ? widen(tokenScales[blockIdx.x]) : 1.f;
  uint4 gates[PER_THREAD], ups[PER_THREAD];
#pragma unroll
  for (int c = 0; c < PER_THREAD; c++) {
    int i = threadIdx.x + c * blockDim.x;
    if (i >= count) break;
    gates[c] = from[i], ups[c] = from[i + count];
  }
  float v[PER_THREAD][8];
#pragma unroll
  for (int c = 0; c < PER_THREAD; c++) {
    int i = threadIdx.x + c * blockDim.x;
    if (i >= count) break;
    float up[8];
    unpack8(gates[c], v[c]);
    unpack8(ups[c], up);
    if (rowScales) {
      scale8(v[c], rowScales, i, token);
      scale8(up, rowScales, i + count, token);
    }
    for (int j = 0; j < 8; j++) v[c][j] = activate(v[c][j], gelu) * up[j];
    if (!outScales) ((uint4*)((bf16*)out + (u64)blockIdx.x * width))[i] = pack8(v[c]);
  }
  if (!outScales) return;
  storeE4m3<PER_THREAD>(v, count, (e4m3*)out + (u64)blockIdx.x * width, outScales + blockIdx.x,
                        scratch);
}
