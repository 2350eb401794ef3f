// Owns what the filters keep of a row: top_k → top_p → min_p → typical_p, as src/engine/sampler.ts
// orders and defines them. Each is a border in keys; top_p and typical_p sum weights, top_k counts.
#pragma once
#include "border.cuh"

/** What filters leave: logits from `least` on, of those equal to it ids up to `lastId`. */
struct Kept {
  float least;
  int lastId;
  // typical_p: how far from `center`, nats below the maximum, a token may be.
  float surprise, center;

  __device__ __forceinline__ bool has(const Scale& scale, float x, int id) const {
    if (x < least || (x == least && id > lastId)) return false;
    return fabsf(scale.distance(x) - center) <= surprise;
  }
};

struct ByCount {
  Scale scale;
  __device__ __forceinline__ bool takes(float x, int) const { return x != -INFINITY; }
  __device__ __forceinline__ u32 key(float x) const { return keyOf(x); }
  __device__ __forceinline__ float distance(float x) const { return scale.distance(x); }
  __device__ __forceinline__ float distanceOf(u32 key) const { return distance(ofKey(key)); }
  __device__ __forceinline__ u64 mass(float) const { return 1; }
};

struct ByWeight {
  Scale scale;
  float least;
  __device__ __forceinline__ bool takes(float x, int) const { return x >= least; }
  __device__ __forceinline__ u32 key(float x) const { return keyOf(x); }
  __device__ __forceinline__ float distance(float x) const { return scale.distance(x); }
  __device__ __forceinline__ float distanceOf(u32 key) const { return distance(ofKey(key)); }
  __device__ __forceinline__ u64 mass(float x) const { return scale.weight(x); }
};

struct ByTypicality {
  Scale scale;
  Kept kept;
  float center;
  __device__ __forceinline__ bool takes(float x, int id) const { return kept.has(scale, x, id); }
  __device__ __forceinline__ u32 key(float x) const { return keyOf(-distance(x)); }
  __device__ __forceinline__ float distance(float x) const {
    return fabsf(scale.distance(x) - center);
  }
  __device__ __forceinline__ float distanceOf(u32 key) const { return -ofKey(key); }
  __device__ __forceinline__ u64 mass(float x) const { return scale.weight(x); }
};

/** The id of the n-th token (from 1) with this logit, in order of ids. Meets twice. */
__device__ inline int nthEqual(Team& team, const Row& row, float logit, u64 n) {
  int id = locate(
      team, row, [&](float x, int) { return (u64)(x == logit); }, [&](u64) { return n - 1; });
  team.exchange(id + 1);
  return (int)team.most() - 1;
}

/** top_p, of what is kept. */
__device__ inline void keepNucleus(Team& team, const Row& row, const Scale& scale, double share,
                                   Kept& kept, Search& s, List& list) {
  // Beyond this all tokens together weigh less than what may be left out.
  float farthest = fminf(logf(row.vocab / (float)(1 - share)) + 0.1f, NOTHING_BEYOND);
  u32 bound = kept.least > -INFINITY ? keyOf(kept.least) : 0;
  Border at = border(team, row, s, list, ByWeight{scale, kept.least}, bound, farthest,
                     [&](u64 total) { return max((u64)ceil(share * (double)total), 1ull); });
  if (at.key == LEAST_KEY) return;
  kept.least = ofKey(at.key);
  if (at.equal == 1) return;
  // Of equal logits at the border only as many stay as are needed, by id.
  u64 each = scale.weight(kept.least);
  u64 needed = each && at.target > at.above ? (at.target - at.above + each - 1) / each : 1;
  if (needed < at.equal) kept.lastId = nthEqual(team, row, kept.least, needed);
}

/** typical_p (Meister et al. 2023): the tokens nearest to the entropy that hold `share`. */
__device__ inline void keepTypical(Team& team, const Row& row, const Scale& scale, double share,
                                   Kept& kept, Search& s, List& list) {
  u64 mass = 0, moment = 0, fraction = 0;
  row.each([&](float x, int id) {
    if (!kept.has(scale, x, id)) return;
    u64 weight = scale.weight(x);
    if (!weight) return;
    // In units of 2^-32: sums do not depend on their order.
    double product = (double)weight * scale.distance(x);
    u64 whole = (u64)product;
    mass += weight, moment += whole, fraction += (u64)((product - (double)whole) * 4294967296.0);
  });
  auto sumOf = [&](u64 x) {
    team.exchange(warpSum64(x));
    return team.sum();
  };
  double total = (double)sumOf(mass), wholes = (double)sumOf(moment);
  double sum = wholes + (double)sumOf(fraction) / 4294967296.0;
  // −ln p = distance + ln(total): its mean is the entropy, so distances are compared with theirs.
  float center = (float)(sum / total);
  Border at = border(team, row, s, list, ByTypicality{scale, kept, center}, 0, INFINITY,
                     [&](u64 all) { return (u64)ceil(share * (double)all); });
  kept.surprise = at.key == LEAST_KEY ? INFINITY : -ofKey(at.key);
  kept.center = center;
}

/**
 * @param topBound a key that the border of top_k is not below
 * @param logMinP the logarithm of min_p, if that is on
 */
__device__ inline Kept filter(Team& team, const Row& row, const Scale& scale, const Sampling& p,
                              u32 topBound, float logMinP, Search& s, List& list) {
  Kept kept = {-INFINITY, row.vocab, INFINITY, 0.f};
  if (p.topK > 0 && p.topK < row.vocab) {
    Border at = border(team, row, s, list, ByCount{scale}, topBound, INFINITY,
                       [&](u64) { return (u64)p.topK; });
    kept.least = ofKey(at.key);
  }
  if (p.topP < 1) keepNucleus(team, row, scale, p.topP, kept, s, list);
  if (p.minP > 0) {
    // The likeliest token weighs 1: the border is a logit.
    float least = scale.max + logMinP / scale.inverse;
    if (least > kept.least) kept.least = least, kept.lastId = row.vocab;
  }
  if (p.typicalP < 1) keepTypical(team, row, scale, p.typicalP, kept, s, list);
  return kept;
}
