// Owns log-probabilities under the model's own distribution, of the chosen token and the likeliest
// ones (ties by id), as src/engine/sampler.ts reports them: the part of sample.cu for outputs whose
// sequence asks. One pass over the row and one meeting of its blocks sum weights, which are those
// of temperature 1, and collect all tokens not below the n-th largest of the warps' largest: they
// are few. Another for rows that biases or penalties changed. Absolute error under 1e-5. Oracle:
// test/cuda/sample.gpu.ts.
#pragma once
#include "logits-row.cuh"
#include "token-list.cuh"

#define TOP_MAX 20

/** What the host reads, as src/backends/cuda/logprobs.ts has it. */
struct Report {
  float logprob;
  /** Likeliest first, as many as were asked for. */
  int topTokens[TOP_MAX];
  float topLogprobs[TOP_MAX];
};

/** This warp's largest entry below `last`. */
__device__ inline u64 largestBelow(const Row& row, u64 last) {
  u64 best = 0;
  row.each([&](float x, int id) {
    u64 entry = entryOf(x, id);
    if (entry < last && entry > best) best = entry;
  });
  return warpMax64(best);
}

/**
 * After a meeting at which each warp told its largest entry. All threads of all blocks call it.
 * @param best the largest entry of the row that tokens are chosen from
 * @param to in host memory; the likeliest `wanted` are written, the chosen token's is left out
 * @param cut shared memory
 * @returns what a logit exceeds its log-probability by
 */
__device__ inline float report(Team& team, Row row, List& list, u64 best, int wanted, Report* to,
                               u64* cut) {
  if (row.adjusted) {
    row.adjusted = nullptr, row.heldEnd = row.first;
    team.exchange(largestBelow(row, ~0ull));
    best = team.most();
  }
  u64 least = wanted > 0 ? team.nth(wanted, cut) : ~0ull;
  // A run of nothing but -Infinity says that of its first token.
  if (least >> 32 <= LEAST_KEY) least = 0;
  Scale scale = {logitOf(best), 1.f};
  u64 sum = 0;
  row.each([&](float x, int id) {
    sum += scale.weight(x);
    u64 entry = entryOf(x, id);
    if (entry >= least && id < row.vocab) list.add(entry, 0);
  });
  team.meet(warpSum64(sum));
  float norm = scale.max + logf((float)team.sum() * (1.f / WEIGHT_ONE));
  auto write = [&](int n, u64 entry) {
    to->topTokens[n] = idOf(entry), to->topLogprobs[n] = logitOf(entry) - norm;
  };
  if (wanted == 0) return norm;
  int count = list.gather(team).count;
  if (count <= LISTED) {
    if (team.rank == 0) {
      list.rank(count, [&](Entry entry, u64, u64, int larger, int) {
        if (larger < wanted) write(larger, entry.key);
      });
    }
  } else {
    // Many of them lie in one run: one after the other, then.
    for (int n = 0; n < wanted; n++) {
      if (n > 0) {
        team.exchange(largestBelow(row, best));
        best = team.most();
      }
      if (team.rank == 0 && threadIdx.x == 0) write(n, best);
    }
  }
  // Lists of other blocks have been read.
  team.exchange(0);
  return norm;
}
