// Owns log-probabilities under the model's own distribution, of the chosen token and the likeliest
// ones (ties by id), as src/engine/sampler.ts reports them: the part of sample.cu for outputs whose
// sequence asks. A row is read twice (513 KB each for 128,256 tokens); for each of the likeliest
// the warp that had the last one reads 1/1,024 of it again. float32, sums in a fixed order:
// absolute error under 1e-5. Oracle: test/cuda/sample.gpu.ts.
#pragma once
#include "sample.cuh"

#define TOP_MAX 20

/** What the host reads, as src/backends/cuda/logprobs.ts has it. */
struct Report {
  float logprob;
  /** Likeliest first, as many as were asked for. */
  int topTokens[TOP_MAX];
  float topLogprobs[TOP_MAX];
};

/** Of logits first, first + stride …: the largest entry below `last`; larger logits, lower ids. */
__device__ __forceinline__ u64 largestBelow(const float* row, int vocab, int first, int stride,
                                            u64 last) {
  u64 best = 0;
#pragma unroll 4
  for (int i = first; i < vocab; i += stride) {
    u64 entry = (u64)keyOf(row[i]) << 32 | (0xffffffffu - i);
    if (entry < last && entry > best) best = entry;
  }
  return best;
}

/** All threads of the block call it; `to` lies in host memory. */
__device__ inline void report(const float* row, int vocab, int token, int wanted, Report* to,
                              u64* scratch) {
  u64 own = largestBelow(row, vocab, threadIdx.x, SAMPLE_THREADS, ~0ull);
  u64 best = blockMax64(own, scratch);
  float max = ofKey((u32)(best >> 32));
  double sum = 0;
  for (int i = threadIdx.x; i < vocab; i += SAMPLE_THREADS) sum += __expf(row[i] - max);
  float norm = max + (float)log(blockSumDouble(sum, scratch));
  if (threadIdx.x == 0) to->logprob = row[token] - norm;
  for (int n = 0; n < wanted; n++) {
    u32 id = 0xffffffffu - (u32)best;
    if (threadIdx.x == 0) {
      to->topTokens[n] = (int)id;
      to->topLogprobs[n] = ofKey((u32)(best >> 32)) - norm;
    }
    int owner = id % SAMPLE_THREADS;
    if (threadIdx.x >> 5 == owner >> 5) {
      int lane = threadIdx.x & 31;
      u64 next = largestBelow(row, vocab, owner + lane * SAMPLE_THREADS, 32 * SAMPLE_THREADS, best);
      next = warpMax64(next);
      if (threadIdx.x == owner) own = next;
    }
    best = blockMax64(own, scratch);
  }
}
