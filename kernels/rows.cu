// Owns what moves whole rows about: selection of the rows whose next token is wanted, plain sums.
// bf16; 4 or 6 bytes an element, launch-bound for a decode batch. Oracle:
// test/cuda/elementwise.gpu.ts.
#include "common.cuh"

/** out[i] = in[index[i]], rows of `width` elements, a multiple of 8. */
extern "C" __global__ void selectRows(const bf16* in, const int* index, bf16* out, int width) {
  awaitInputs();
  releaseDependents();
  const uint4* from = (const uint4*)(in + (u64)index[blockIdx.x] * width);
  uint4* to = (uint4*)(out + (u64)blockIdx.x * width);
  for (int i = threadIdx.x; i < width >> 3; i += blockDim.x) to[i] = from[i];
}

/** out = a + b over `count` groups of 8 elements. */
extern "C" __global__ void addRows(const bf16* a, const bf16* b, bf16* out, u64 count) {
  awaitInputs();
  releaseDependents();
  u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x;
  if (i >= count) return;
  float x[8], y[8];
  unpack8(((const uint4*)a)[i], x);
  unpack8(((const uint4*)b)[i], y);
  for (int j = 0; j < 8; j++) x[j] += y[j];
  ((uint4*)out)[i] = pack8(x);
}

/** out[row] += bias, rows `stride` elements apart. */
extern "C" __global__ void addBias(bf16* out, const float* bias, int width, int stride) {
  awaitInputs();
  releaseDependents();
  bf16* row = out + (u64)blockIdx.x * stride;
  for (int i = threadIdx.x; i < width; i += blockDim.x) row[i] = narrow(widen(row[i]) + bias[i]);
}
