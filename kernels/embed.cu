// Owns the lookup of embedding rows: out[t] = scale · table[token[t]], bf16. Reads and writes
// 2·width bytes a token (8 KiB for 4,096: launch-bound, 2 µs). Exact for scale 1; otherwise one
// rounding (relative 2^-9). Oracle: test/cuda/elementwise.gpu.ts.
#include "common.cuh"

extern "C" __global__ void embed(const bf16* table, const int* tokens, bf16* out, int width,
                                 int vocab, float scale) {
  awaitInputs();
  releaseDependents();
  int row = blockIdx.x;
  int token = tokens[row];
  // A token that the vocabulary lacks must not read elsewhere: it shows as NaN in the logits.
  bool known = token >= 0 && token < vocab;
  const bf16* from = table + (u64)(known ? token : 0) * width;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    float x = known ? widen(from[i]) : __uint_as_float(0x7fc00000u);
    out[(u64)row * width + i] = scale == 1.f && known ? from[i] : narrow(x * scale);
  }
}
