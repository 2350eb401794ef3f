// Owns the choice of the next token from a row of logits on the device, without sorting: what
// src/engine/sampler.ts defines, in its order, with its random numbers.
//
//   logit_bias → repetition, presence, frequency penalties → temperature → top_k → top_p → min_p
//   → typical_p → one draw, which inverts the cumulative distribution in order of token ids
//
// A row is a cluster's, of 1 to 8 blocks that hold it in shared memory: it is read once, 513 KB for
// 128,256 tokens, then looked at once more for a plain draw, three times for top_p. Reading 64 rows
// takes 11 µs on an H100; measured with their launch: greedy 21, a plain draw 32, top_p 55 to 76.
// A row alone: 12, 16, 30 to 39. Weights have float32's precision (2^-22),
// the CPU's have float64's: a draw that falls between the two differs. The token is the same for
// any number of blocks. Oracle: test/cuda/sample.gpu.ts.
#include "filters.cuh"
#include "logprobs.cuh"

#define BIASES_MAX 1024

struct Shared {
  Mail mail;
  Search search;
  u64 cuts[2];
  /** The sequence's, and what is computed of them only once. */
  Sampling params;
  double uniform;
  float logMinP;
};

/** Of tokens some of which have come up, `counts` as in sequences' memory. Rare. */
static __device__ __noinline__ float4 penalisedGroup(float4 x, uint2 counts, double repetition,
                                                     double presence, double frequency) {
  auto one = [&](float logit, int count) {
    if (count == 0) return logit;
    double x = logit;
    x = x < 0 ? x * repetition : x / repetition;
    count &= 0x7fff;
    if (count > 0) x -= presence + frequency * count;
    return (float)x;
  };
  return make_float4(one(x.x, counts.x & 0xffff), one(x.y, counts.x >> 16),
                     one(x.z, counts.y & 0xffff), one(x.w, counts.y >> 16));
}

/** As each sequence has them, in its slot; see sampling.ts. */
struct Changes {
  const int* biasTokens;
  const float* biases;
  const bf16* counts;
  const Sampling& p;

  /** Of four tokens, what is kept of each: how often it was generated, and whether it came up. */
  __device__ __forceinline__ uint2 countsAt(int g, int vocab) const {
    if (vocab % 4 == 0) return ((const uint2*)counts)[g];
    auto one = [&](int i) { return i < vocab ? (u32)counts[i] : 0; };
    return make_uint2(one(4 * g) | one(4 * g + 1) << 16, one(4 * g + 2) | one(4 * g + 3) << 16);
  }
};

/** Biases are of any tokens, so that the whole block has to have its part of the row first. */
__device__ inline void addBiases(const Team& team, const Row& row, const Changes& of) {
  copiesDone(true);
  for (int g = row.tail(); g < row.last; g += 32) row.put(g, fourOf(row.raw, 4 * g, row.vocab));
  __syncthreads();
  for (int i = threadIdx.x; i < of.p.biases; i += SAMPLE_THREADS) {
    float* place = row.placeOf(of.biasTokens[i], team);
    if (place) *place += of.biases[i];
  }
  __syncthreads();
}

/**
 * Takes what was ordered as it comes, and changes it.
 * @returns this warp's largest entry in all lanes; more than any if no token can be chosen
 */
__device__ inline u64 takeIn(const Team& team, const Row& row, const Changes& of) {
  float best = -INFINITY;
  int bestGroup = row.first;
  const bool biased = of.p.biases > 0, penalised = of.p.penalised;
  /** Up to AHEAD groups, 32 apart, which `of` has brought. */
  auto take = [&](int g, int end, Batch& batch) {
    uint2 counts[AHEAD];
    if (penalised) {
#pragma unroll
      for (int k = 0; k < AHEAD; k++) {
        if (g + 32 * k < end) counts[k] = of.countsAt(g + 32 * k, row.vocab);
      }
    }
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      if (g + 32 * k >= end) break;
      float4 x = batch.x[k];
      if (penalised && (counts[k].x | counts[k].y)) {
        x = penalisedGroup(x, counts[k], of.p.repetition, of.p.presence, of.p.frequency);
        row.put(g + 32 * k, x);
      } else if (penalised && !biased && g >= row.heldEnd) {
        row.put(g + 32 * k, x);
      }
      float most = maxOrNan(maxOrNan(x.x, x.y), maxOrNan(x.z, x.w));
      if (most > best) bestGroup = g + 32 * k;
      best = maxOrNan(best, most);
    }
  };
  if (biased) addBiases(team, row, of);
#pragma unroll 1
  for (int half = 0; half < 2; half++) {
    copiesDone(half);
    int end = row.endOf(half);
#pragma unroll 1
    for (int g = row.start(half); g < end; g += 32 * AHEAD) {
      Batch batch;
#pragma unroll
      for (int k = 0; k < AHEAD; k++) {
        if (g + 32 * k < end) batch.x[k] = row.heldAt(g + 32 * k);
      }
      take(g, end, batch);
    }
  }
#pragma unroll 1
  for (int g = row.tail(); g < row.last; g += 32 * AHEAD) {
    Batch batch;
    batch.load(biased ? row.adjusted : row.raw, row, g);
    take(g, row.last, batch);
  }
  u64 mine = best < INFINITY ? entryOf(best, 4 * bestGroup) : ~0ull, most = warpMax64(mine);
  if (most == ~0ull || most >> 32 <= LEAST_KEY) return most;
  u32 winner = __ffs(__ballot_sync(~0u, mine == most)) - 1;
  if (mine == most) {
    float4 x = row.at(bestGroup);
    mine -= x.x == best ? 0 : x.y == best ? 1 : x.z == best ? 2 : 3;
  }
  return __shfl_sync(~0u, mine, winner);
}

/** One draw from what the filters keep, as `locate`; `none`: they keep nothing. */
__device__ inline int draw(Team& team, const Row& row, const Scale& scale, const Sampling& p,
                           Shared& s, List& list, u32 topBound, bool& none) {
  auto targetOf = [&](u64 total) {
    none = total == 0;
    u64 target = (u64)(s.uniform * (double)total);
    return target >= total ? total - 1 : target;
  };
  bool topK = p.topK > 0 && p.topK < row.vocab;
  if (!topK && p.topP >= 1 && p.minP <= 0 && p.typicalP >= 1) {
    return locate(team, row, [&](float x, int) { return scale.weight(x); }, targetOf);
  }
  Kept kept = filter(team, row, scale, p, topBound, s.logMinP, s.search, list);
  auto mass = [&](float x, int id) { return kept.has(scale, x, id) ? scale.weight(x) : 0; };
  return locate(team, row, mass, targetOf);
}

/**
 * A row is those blocks of the grid that have its number as y: a cluster, or one. Dynamic shared
 * memory holds what it can of a block's part of the row.
 *
 * logits: [outputs, vocab]; slotOf: each output's slot, -1 for padding; table: by slot; biasTokens,
 * biases: [slot, BIASES_MAX]; counts: [slot, vocab], bit 15 says that the token has come up, the
 * rest how often it was generated (null if nobody is penalised); adjusted: [outputs, vocab] for
 * what is not held of rows with biases or penalties. tokens: by output, -1 if no token can be
 * chosen; lastTokens: by slot. reports: in host memory, `entries` in each of `places`; `steps` says
 * which place is this step's. Only outputs whose sequence asks for log-probabilities have one.
 */
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS, 1)
    sample(const float* logits, int vocab, const int* slotOf, Sampling* table,
           const int* biasTokens, const float* biases, bf16* counts, float* adjusted, int* tokens,
           int* lastTokens, Report* reports, int places, int entries, const u64* steps) {
  __shared__ Shared s;
  extern __shared__ float4 held[];
  awaitInputs();
  releaseDependents();
  const int output = blockIdx.y;
  Team team = {(int)blockIdx.x, (int)gridDim.x, s.mail, 0, 0};
  Row row(logits + (u64)output * vocab, vocab, held, dynamicSharedBytes(), team);
  // Under way while it becomes known what to do with it.
  row.order();
  const int slot = slotOf[output];
  if (slot < 0) {
    copiesDone(true);
    return;
  }
  team.begin();
  const Sampling& early = table[slot];
  List list(s.search.lists);
  if (early.biases || early.penalised) row.adjusted = adjusted + (u64)output * vocab;
  Changes changes = {biasTokens + (u64)slot * BIASES_MAX, biases + (u64)slot * BIASES_MAX,
                     counts + (u64)slot * vocab, early};
  u64 best = takeIn(team, row, changes);
  if (threadIdx.x == 0) {
    s.params = early;
    s.uniform = uniform(early.seedLow, early.seedHigh, early.drawn);
    if (early.minP > 0) s.logMinP = (float)log(early.minP);
  }
  team.begun();
  // What the first thread has written is for all of the block.
  __syncthreads();
  team.exchange(best);
  best = team.most();
  const Sampling& p = s.params;
  const bool draws = p.temperature > 0;
  int token = best == ~0ull || logitOf(best) == -INFINITY ? -1 : idOf(best);
  bool mine = team.self() == 0;
  float norm = 0;
  Report* to = nullptr;
  if (token >= 0) {
    u32 topBound = 0;
    if (draws && p.topK > 0 && p.topK <= team.size * WARPS) {
      topBound = (u32)(team.nth(p.topK, &s.cuts[0]) >> 32);
      if (topBound <= LEAST_KEY) topBound = 0;
    }
    if (p.logprobs >= 0) {
      to = reports + *steps % places * entries + output;
      norm = report(team, row, list, best, p.logprobs, to, &s.cuts[1]);
    }
    if (draws) {
      Scale scale = {logitOf(best), (float)fmin(1 / p.temperature, 3.0e38)};
      bool none = false;
      token = draw(team, row, scale, p, s, list, topBound, none);
      mine = token >= 0 || (none && mine);
    }
  }
  if (!mine || (threadIdx.x & 31)) return;
  tokens[output] = token;
  lastTokens[slot] = max(token, 0);
  if (draws) table[slot].drawn = p.drawn + 1;
  if (token < 0) return;
  if (to) to->logprob = row.raw[token] - norm;
  if (p.penalised) {
    bf16* count = counts + (u64)slot * vocab + token;
    *count = 0x8000 | min((*count & 0x7fff) + 1, 0x7fff);
  }
}
