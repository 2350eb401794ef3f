// Owns attention by its definition, for tests: softmax(scale·q·K)·V of one row of queries over
// its slot, float32, one block a head and row, scores in shared memory in pieces (online softmax,
// Milakov & Gimelshein 2018). It is slow and simple: the oracle of the fast kernels on the device,
// itself compared with transformers in test/cuda/families.gpu.ts.
#include "common.cuh"

#define PIECE 256

/**
 * q, out: [rows, heads·headDim] bf16; row i attends its slot's tokens (position − window,
 * position]; window 0 is none. A row without slot gives zeros.
 */
extern "C" __global__ void __launch_bounds__(256)
    attentionReference(const bf16* q, bf16* out, int qStride, int outStride, const int* positions,
                       const u64* slots, int heads, int kvHeads, int headDim, u64 tokenStride,
                       u64 layerOffset, float scale, int window) {
  __shared__ float scores[PIECE], query[256], scratch[33];
  awaitInputs();
  releaseDependents();
  int row = blockIdx.y, head = blockIdx.x, d = threadIdx.x;
  int position = positions[row], kvHead = head / (heads / kvHeads);
  u64 slot = slots[row];
  if (slot == 0) {
    if (d < headDim) out[(u64)row * outStride + head * headDim + d] = 0;
    return;
  }
  if (d < headDim) query[d] = widen(q[(u64)row * qStride + head * headDim + d]) * scale;
  __syncthreads();
  const char* base = (const char*)slot + layerOffset + kvHead * headDim * 2;
  u64 values = (u64)kvHeads * headDim * 2;
  int first = window > 0 ? max(0, position - window + 1) : 0;
  float max = -INFINITY, sum = 0.f, acc = 0.f;
  for (int from = first; from <= position; from += PIECE) {
    int count = min(PIECE, position + 1 - from);
    float score = -INFINITY;
    if (d < count) {
      const bf16* key = (const bf16*)(base + (u64)(from + d) * tokenStride);
      score = 0.f;
      for (int i = 0; i < headDim; i++) score += query[i] * widen(key[i]);
    }
    float best = warpMax(score);
    __syncthreads();
    if ((d & 31) == 0) scratch[d >> 5] = best;
    __syncthreads();
    best = max;
    for (int w = 0; w < 8; w++) best = fmaxf(best, scratch[w]);
    float weight = d < count ? expf(score - best) : 0.f;
    scores[d] = weight;
    float shrink = expf(max - best);
    sum = sum * shrink + blockSum(weight, scratch);
    acc *= shrink;
    max = best;
    if (d < headDim) {
      for (int i = 0; i < count; i++) {
        acc += scores[i] * widen(((const bf16*)(base + (u64)(from + i) * tokenStride + values))[d]);
      }
    }
  }
  if (d < headDim) out[(u64)row * outStride + head * headDim + d] = narrow(acc / sum);
}
