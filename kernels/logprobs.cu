// Owns log-probabilities under the model's own distribution, of the chosen token and the likeliest
// ones (ties by id), as src/engine/sampler.ts reports them. One block an output that asks for any:
// the row is read 2 + n times (513 KB each for 128,256 tokens). float32, sums in a fixed order:
// absolute error under 1e-5. Oracle: test/cuda/sample.test.ts.
#include "sample.cuh"

#define TOP_MAX 20

/** logprob: by output; topTokens, topLogprobs: [outputs, TOP_MAX], likeliest first. */
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)
    logprobs(const float* logits, int vocab, const int* slotOf, const Sampling* table,
             const int* tokens, float* logprob, int* topTokens, float* topLogprobs) {
  __shared__ u64 scratch[32];
  awaitInputs();
  releaseDependents();
  int slot = slotOf[blockIdx.x];
  if (slot < 0 || table[slot].logprobs < 0 || tokens[blockIdx.x] < 0) return;
  const float* row = logits + (u64)blockIdx.x * vocab;
  u64 last = ~0ull;
  float norm = 0.f;
  int wanted = max(table[slot].logprobs, 1);
  for (int n = 0; n < wanted; n++) {
    // The largest entry below the last one: larger logits first, then lower ids.
    u64 best = 0;
    for (int i = threadIdx.x; i < vocab; i += SAMPLE_THREADS) {
      u64 entry = (u64)keyOf(row[i]) << 32 | (0xffffffffu - i);
      if (entry < last && entry > best) best = entry;
    }
    last = blockMax64(best, scratch);
    float value = ofKey((u32)(last >> 32));
    if (n == 0) {
      double sum = 0;
      for (int i = threadIdx.x; i < vocab; i += SAMPLE_THREADS) sum += __expf(row[i] - value);
      norm = value + (float)log(blockSumDouble(sum, scratch));
    }
    if (threadIdx.x == 0 && n < table[slot].logprobs) {
      topTokens[blockIdx.x * TOP_MAX + n] = (int)(0xffffffffu - (u32)last);
      topLogprobs[blockIdx.x * TOP_MAX + n] = value - norm;
    }
  }
  if (threadIdx.x == 0) logprob[blockIdx.x] = row[tokens[blockIdx.x]] - norm;
}
