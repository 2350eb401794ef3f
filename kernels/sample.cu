// Owns the choice of the next token from a row of logits on the device, without sorting: what
// src/engine/sampler.ts defines, in its order, with its random numbers. One block a row.
//
//   logit_bias → repetition, presence, frequency penalties → temperature → top_k → top_p → min_p
//   → typical_p → one draw, which inverts the cumulative distribution in order of token ids
//
// Thresholds come from a histogram over the distance to the maximum (one sweep of the row), then
// an exact search among the tokens of one bucket (cf. the threshold searches of FlashInfer, Ye et
// al. 2025, arXiv:2501.01005). A greedy row is read once: 513 KB for 128,256 tokens, 6 µs for a
// block; a filtered one four times and a half, 40 µs. Weights have float32's precision (2^-22),
// the CPU's have float64's: a draw that falls between the two differs. Oracle:
// test/cuda/sample.gpu.ts.
#include "logprobs.cuh"

#define BUCKETS 2048
#define BUCKETS_PER_NAT 64  // 32 nats: what lies beyond weighs less than 2^-40, that is nothing
#define LISTED 2048         // tokens of one bucket that are searched in shared memory
#define BIASES_MAX 1024

struct Shared {
  u64 sums[32];
  u64 mass[BUCKETS];
  u32 count[BUCKETS];
  u32 keys[LISTED];
  int listed;
  int bucket;
  u64 above;
  int found;
};

/** What filters leave: keys from `least` on, of those equal to `least` ids up to `lastId`. */
struct Kept {
  u32 least;
  int lastId;
  // typical_p: how far from `center`, nats below the maximum, a token may be.
  float surprise, center;
};

struct Row {
  const float* logits;
  int vocab;
  float max, inverse;
  __device__ float distance(float x) const { return (max - x) * inverse; }
  __device__ u64 weight(float x) const { return (u64)(__expf(-distance(x)) * WEIGHT_ONE); }
  __device__ bool keeps(const Kept& kept, int i, float x) const {
    u32 key = keyOf(x);
    if (key < kept.least || (key == kept.least && i > kept.lastId)) return false;
    return fabsf(distance(x) - kept.center) <= kept.surprise;
  }
  __device__ int bucket(float x) const {
    float at = distance(x) * BUCKETS_PER_NAT;
    return at < BUCKETS - 1 ? (int)at : BUCKETS - 1;
  }
};

/**
 * The largest key at which counts (byCount) or weights of finite logits with keys ≥ `least`,
 * summed from the top, reach `target`; `above` is what keys beyond it sum to. The histogram is
 * filled.
 */
__device__ u32 threshold(const Row& row, u32 least, bool byCount, u64 target, Shared& s,
                         u64& above) {
  if (threadIdx.x == 0) {
    u64 sum = 0;
    int b = 0;
    for (; b < BUCKETS - 1; b++) {
      u64 here = byCount ? s.count[b] : s.mass[b];
      if (sum + here >= target) break;
      sum += here;
    }
    s.bucket = b;
    s.above = sum;
    s.listed = 0;
  }
  __syncthreads();
  int bucket = s.bucket;
  u64 before = s.above;
  for (int i = threadIdx.x; i < row.vocab; i += SAMPLE_THREADS) {
    float x = row.logits[i];
    if (row.bucket(x) != bucket || keyOf(x) < least || x == -INFINITY) continue;
    int place = atomicAdd(&s.listed, 1);
    if (place < LISTED) s.keys[place] = keyOf(x);
  }
  __syncthreads();
  u32 key;
  if (s.listed <= LISTED) {
    key = reach(s.listed, target - before, [&](int i, u32& k, u64& m) {
      k = s.keys[i];
      m = byCount ? 1 : row.weight(ofKey(k));
    }, s.sums);
  } else {
    key = reach(row.vocab, target - before, [&](int i, u32& k, u64& m) {
      float x = row.logits[i];
      k = keyOf(x);
      bool here = row.bucket(x) == bucket && k >= least && x != -INFINITY;
      m = !here ? 0 : byCount ? 1 : row.weight(x);
    }, s.sums);
  }
  u64 sum = 0;
  for (int i = threadIdx.x; i < row.vocab; i += SAMPLE_THREADS) {
    float x = row.logits[i];
    if (keyOf(x) > key && x != -INFINITY) sum += byCount ? 1 : row.weight(x);
  }
  above = blockSum64(sum, s.sums);
  return max(key, least);
}

/** The id of the `nth` token (from 1) with this key, in order of ids. */
__device__ int nthEqual(const Row& row, u32 key, u64 nth, Shared& s) {
  u64 seen = 0;
  for (int base = 0; base < row.vocab; base += SAMPLE_THREADS) {
    int i = base + threadIdx.x;
    bool equal = i < row.vocab && keyOf(row.logits[i]) == key;
    u64 here = __syncthreads_count(equal);
    if (seen + here >= nth) {
      // Among 1,024 tokens: how many of the equal ones come before this one.
      u32 votes = __ballot_sync(~0u, equal);
      if ((threadIdx.x & 31) == 0) s.count[threadIdx.x >> 5] = __popc(votes);
      __syncthreads();
      u64 rank = seen + __popc(votes & (0xffffffffu >> (31 - (threadIdx.x & 31))));
      for (int w = 0; w < threadIdx.x >> 5; w++) rank += s.count[w];
      if (equal && rank == nth) s.found = i;
      __syncthreads();
      return s.found;
    }
    seen += here;
  }
  return row.vocab;
}

__device__ Kept filter(const Row& row, const Sampling& p, Shared& s) {
  Kept kept = {0, row.vocab, INFINITY, 0.f};
  bool topK = p.topK > 0 && p.topK < row.vocab;
  if (topK || p.topP < 1) {
    for (int b = threadIdx.x; b < BUCKETS; b += SAMPLE_THREADS) s.mass[b] = s.count[b] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < row.vocab; i += SAMPLE_THREADS) {
      float x = row.logits[i];
      if (x == -INFINITY) continue;
      int b = row.bucket(x);
      atomicAdd(&s.count[b], 1u);
      atomicAdd(&s.mass[b], row.weight(x));
    }
    __syncthreads();
  }
  u64 above;
  if (topK) kept.least = threshold(row, 0, true, p.topK, s, above);
  if (p.topP < 1) {
    u64 sum = 0;
    for (int i = threadIdx.x; i < row.vocab; i += SAMPLE_THREADS) {
      float x = row.logits[i];
      if (keyOf(x) >= kept.least) sum += row.weight(x);
    }
    u64 target = (u64)ceil(p.topP * (double)blockSum64(sum, s.sums));
    target = target > 0 ? target : 1;
    kept.least = threshold(row, kept.least, false, target, s, above);
    // Of equal logits at the border only as many stay as are needed, by id.
    u64 each = row.weight(ofKey(kept.least));
    u64 needed = each && target > above ? (target - above + each - 1) / each : 1;
    kept.lastId = nthEqual(row, kept.least, needed, s);
  }
  if (p.minP > 0) {
    // The likeliest token weighs 1: the border is a logit.
    u32 least = keyOf(row.max + (float)log(p.minP) / row.inverse);
    if (least > kept.least) kept.least = least, kept.lastId = row.vocab;
  }
  return kept;
}

/** typical_p (Meister et al. 2023): the tokens nearest to the entropy that hold `share`. */
__device__ void keepTypical(const Row& row, double share, Kept& kept, Shared& s) {
  u64 mass = 0;
  double moment = 0;
  for (int i = threadIdx.x; i < row.vocab; i += SAMPLE_THREADS) {
    float x = row.logits[i];
    if (!row.keeps(kept, i, x)) continue;
    u64 weight = row.weight(x);
    mass += weight;
    if (weight) moment += (double)weight * row.distance(x);
  }
  u64 total = blockSum64(mass, s.sums);
  // −ln p = distance + ln(total): its mean is the entropy, so distances are compared with theirs.
  float center = (float)(blockSumDouble(moment, s.sums) / (double)total);
  u64 target = (u64)ceil(share * (double)total);
  u32 key = reach(row.vocab, target, [&](int i, u32& k, u64& m) {
    float x = row.logits[i];
    k = keyOf(-fabsf(row.distance(x) - center));
    m = row.keeps(kept, i, x) ? row.weight(x) : 0;
  }, s.sums);
  kept.surprise = -ofKey(key);
  kept.center = center;
}

__device__ int draw(const Row& row, const Kept& kept, double u, Shared& s) {
  // A warp sums a run of tokens; then the run in which the target lies is walked again.
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, run = (row.vocab + 31) / 32;
  int from = warp * run, to = min(row.vocab, from + run);
  u64 sum = 0;
  for (int i = from + lane; i < to; i += 32) {
    float x = row.logits[i];
    if (row.keeps(kept, i, x)) sum += row.weight(x);
  }
  sum = warpSum64(sum);
  __syncthreads();
  if (lane == 0) s.sums[warp] = sum;
  __syncthreads();
  u64 total = 0;
  for (int w = 0; w < 32; w++) total += s.sums[w];
  u64 target = (u64)(u * (double)total), before = 0;
  if (target >= total) target = total - 1;
  int chosen = 0;
  for (; chosen < 31 && before + s.sums[chosen] <= target; chosen++) before += s.sums[chosen];
  if (warp == chosen) {
    for (int base = from; base < to; base += 32) {
      int i = base + lane;
      u64 weight = 0;
      if (i < to && row.keeps(kept, i, row.logits[i])) weight = row.weight(row.logits[i]);
      u64 prefix = weight;
      for (int d = 1; d < 32; d <<= 1) {
        u64 other = __shfl_up_sync(~0u, prefix, d);
        if (lane >= d) prefix += other;
      }
      u32 reached = __ballot_sync(~0u, before + prefix > target);
      if (reached) {
        if (lane == 0) s.found = base + __ffs(reached) - 1;
        break;
      }
      before += __shfl_sync(~0u, prefix, 31);
    }
  }
  __syncthreads();
  return s.found;
}

/** This thread's largest logit as its key and the complement of its id: lower ids win ties. */
__device__ __forceinline__ u64 largest(const float* row, int vocab, bool& usable) {
  float best = -INFINITY;
  int id = 0;
  auto look = [&](float x, int i) {
    usable = usable && x < INFINITY;
    if (x > best) best = x, id = i;
  };
  // Whole rows begin at multiples of 16 bytes if their length is one.
  int fours = vocab % 4 == 0 ? vocab / 4 : 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < fours; i += SAMPLE_THREADS) {
    float4 x = __ldcs((const float4*)row + i);
    look(x.x, 4 * i), look(x.y, 4 * i + 1), look(x.z, 4 * i + 2), look(x.w, 4 * i + 3);
  }
  for (int i = 4 * fours + threadIdx.x; i < vocab; i += SAMPLE_THREADS) look(row[i], i);
  return (u64)keyOf(best) << 32 | (0xffffffffu - id);
}

/**
 * logits: [outputs, vocab]; slotOf: each output's slot, -1 for padding; table: by slot; biasTokens,
 * biases: [slot, BIASES_MAX]; counts: [slot, vocab], bit 15 says that the token has come up, the
 * rest how often it was generated (null if nobody is penalised); adjusted: [outputs, vocab] for
 * rows with biases or penalties. tokens: by output, -1 if no token can be chosen; lastTokens: by
 * slot. reports: in host memory, `entries` in each of `places`; `steps` says which place is this
 * step's. Only outputs whose sequence asks for log-probabilities have one.
 */
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)
    sample(const float* logits, int vocab, const int* slotOf, Sampling* table,
           const int* biasTokens, const float* biases, bf16* counts, float* adjusted, int* tokens,
           int* lastTokens, Report* reports, int places, int entries, const u64* steps) {
  __shared__ Shared s;
  awaitInputs();
  releaseDependents();
  int slot = slotOf[blockIdx.x];
  if (slot < 0) return;
  Sampling p = table[slot];
  const float* from = logits + (u64)blockIdx.x * vocab;
  if (p.biases || p.penalised) {
    float* to = adjusted + (u64)blockIdx.x * vocab;
    for (int i = threadIdx.x; i < vocab; i += SAMPLE_THREADS) to[i] = from[i];
    __syncthreads();
    for (int i = threadIdx.x; i < p.biases; i += SAMPLE_THREADS) {
      to[biasTokens[(u64)slot * BIASES_MAX + i]] += biases[(u64)slot * BIASES_MAX + i];
    }
    __syncthreads();
    if (p.penalised) {
      for (int i = threadIdx.x; i < vocab; i += SAMPLE_THREADS) {
        int count = counts[(u64)slot * vocab + i];
        if (count == 0) continue;
        double x = to[i];
        x = x < 0 ? x * p.repetition : x / p.repetition;
        count &= 0x7fff;
        if (count > 0) x -= p.presence + p.frequency * count;
        to[i] = (float)x;
      }
      __syncthreads();
    }
    from = to;
  }
  bool usable = true;
  u64 best = blockMax64(largest(from, vocab, usable), s.sums);
  Row row = {from, vocab, ofKey((u32)(best >> 32)), 0.f};
  int token = (int)(0xffffffffu - (u32)best);
  if (!__syncthreads_and(usable) || row.max == -INFINITY) token = -1;
  if (token >= 0 && p.temperature > 0) {
    row.inverse = (float)fmin(1 / p.temperature, 3.0e38);
    Kept kept = filter(row, p, s);
    if (p.typicalP < 1) keepTypical(row, p.typicalP, kept, s);
    token = draw(row, kept, uniform(p.seedLow, p.seedHigh, p.drawn), s);
  }
  if (token >= 0 && p.logprobs >= 0) {
    Report* to = reports + *steps % places * entries + blockIdx.x;
    report(logits + (u64)blockIdx.x * vocab, vocab, token, p.logprobs, to, s.sums);
  }
  if (threadIdx.x) return;
  tokens[blockIdx.x] = token;
  lastTokens[slot] = max(token, 0);
  if (p.temperature > 0) table[slot].drawn = p.drawn + 1;
  if (p.penalised && token >= 0) {
    bf16* count = counts + (u64)slot * vocab + token;
    *count = 0x8000 | min((*count & 0x7fff) + 1, 0x7fff);
  }
}
