// Owns gated activations: out = act(gate)·up for rows [gate | up] of 2·width bf16 (Shazeer 2020,
// arXiv:2002.05202). Moves 6·width bytes a token: 64 × 14,336 is 5.5 MB, 1.8 µs at 3 TB/s. One
// rounding. Oracle: test/cuda/elementwise.gpu.ts.
#include "common.cuh"

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
