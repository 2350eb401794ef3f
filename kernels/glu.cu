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

#define GROUPS 4  // of 8 elements that a thread keeps

/**
 * One row between products of e4m3. EARLY: a thread asks for all that it needs before it looks at
 * any: where there are few rows, waiting is all that takes time.
 */
template <bool EARLY>
__device__ __forceinline__ void gluRow(const bf16* in, void* out, int width, int gelu,
                                       bf16* outScales, Scales scales) {
  __shared__ float scratch[33];
  awaitInputs();
  releaseDependents();
  int count = width >> 3;
  const uint4* from = (const uint4*)(in + (u64)blockIdx.x * 2 * width);
  const uint4* by = (const uint4*)scales.rows;
  uint4 gates[GROUPS], ups[GROUPS], gateScales[GROUPS], upScales[GROUPS];
#pragma unroll
  for (int c = 0; c < GROUPS; c++) {
    int i = threadIdx.x + c * blockDim.x;
    if (i >= count) continue;
    gates[c] = from[i], ups[c] = from[i + count];
    if (EARLY && by) gateScales[c] = by[i], upScales[c] = by[i + count];
  }
  float token = by ? widen(scales.tokens[blockIdx.x]) : 1.f;
  float v[GROUPS][8];
#pragma unroll
  for (int c = 0; c < GROUPS; c++) {
    int i = threadIdx.x + c * blockDim.x;
    if (i >= count) continue;
    float up[8];
    unpack8(gates[c], v[c]);
    unpack8(ups[c], up);
    if (by) {
      scale8(v[c], EARLY ? gateScales[c] : by[i], token);
      scale8(up, EARLY ? upScales[c] : by[i + count], token);
    }
    for (int j = 0; j < 8; j++) {
      float x = v[c][j];
      v[c][j] = up[j] * (gelu ? activate(x, 1) : __fdividef(x, 1.f + __expf(-x)));
    }
    if (!outScales) ((uint4*)((bf16*)out + (u64)blockIdx.x * width))[i] = pack8(v[c]);
  }
  if (!outScales) return;
  storeE4m3<GROUPS>(v, count, (e4m3*)out + (u64)blockIdx.x * width, outScales + blockIdx.x,
                    scratch);
}

/**
 * Of few rows, width ≤ 512 · 8 · 4. outScales: null for an out of bf16, else out is e4m3 and each
 * row has a scale; rowScales: null for an input of numbers, else of the matrix that made it.
 */
extern "C" __global__ void __launch_bounds__(512)
    gluE4m3(const bf16* in, void* out, int width, int gelu, bf16* outScales,
            const bf16* rowScales, const bf16* tokenScales) {
  gluRow<true>(in, out, width, gelu, outScales, {rowScales, tokenScales});
}

/** Of many rows, two blocks a multiprocessor, or wider ones: width ≤ 1024 · 8 · 4. */
extern "C" __global__ void __launch_bounds__(1024)
    gluE4m3Many(const bf16* in, void* out, int width, int gelu, bf16* outScales,
                const bf16* rowScales, const bf16* tokenScales) {
  gluRow<false>(in, out, width, gelu, outScales, {rowScales, tokenScales});
}
