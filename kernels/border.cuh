// Owns the search for the key at which a filter cuts: where masses, summed from the likeliest token
// on, reach a target. A histogram over the distance to the maximum says in which bucket that is;
// the tokens of a bucket are few: they are collected and ranked (cf. the threshold searches of
// FlashInfer, Ye et al. 2025, arXiv:2501.01005). Where they are many, a histogram of their keys
// follows. Two passes over the row and two meetings of its blocks; exact, in integers.
#pragma once
#include "logits-row.cuh"
#include "token-list.cuh"

#define BUCKETS (2 * SAMPLE_THREADS)
#define BUCKETS_PER_NAT 64.f
#define MANY 0x7fffffff

struct Border {
  u32 key;
  /** Tokens with just this key; MANY if they were not counted. */
  int equal;
  /** Masses of larger keys, and what was to be reached. */
  u64 above, target;
};

struct Search {
  /** Of each bucket; then of all up to it. */
  u64 mass[BUCKETS];
  u64 warps[WARPS];
  int bucket;
  u64 before;
  Border found;
  Lists lists;
};

/**
 * 64-bit additions to shared memory are a loop; two of 32 bits, and mostly one, are none. Lower
 * halves come first, so that neighbours lie in different banks.
 */
__device__ __forceinline__ void add(Search& s, int bucket, u64 mass) {
  u32* lower = (u32*)s.mass + bucket;
  u32 low = (u32)mass, high = (u32)(mass >> 32);
  u32 before = atomicAdd(lower, low);
  high += before + low < before;
  if (high) atomicAdd(lower + BUCKETS, high);
}

/** Turns this block's buckets into sums. */
static __device__ __noinline__ void sumBuckets(Search& s) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  uint2 low = ((uint2*)s.mass)[threadIdx.x], high = ((uint2*)s.mass)[BUCKETS / 2 + threadIdx.x];
  u64 a = (u64)high.x << 32 | low.x, b = (u64)high.y << 32 | low.y;
  u64 prefix = warpPrefix64(a + b);
  if (lane == 31) s.warps[warp] = prefix;
  __syncthreads();
  prefix += warpSum64(lane < warp ? s.warps[lane] : 0);
  s.mass[2 * threadIdx.x] = prefix - b, s.mass[2 * threadIdx.x + 1] = prefix;
}

/** One warp: the first bucket with which all blocks' sums reach `target`, and the sum before it. */
static __device__ __noinline__ void findBucket(int blocks, Search& s, u64 target) {
  int lane = threadIdx.x & 31;
  auto upTo = [&](int bucket) {
    u64 sum = 0;
    for (int r = 0; r < blocks; r++) sum += loadFrom(r, &s.mass[bucket]);
    return sum;
  };
  const int part = BUCKETS / 32;
  u64 coarse = upTo(part * lane + part - 1);
  int first = __ffs(__ballot_sync(~0u, coarse >= target)) - 1;
  u64 before = __shfl_sync(~0u, coarse, max(first - 1, 0));
  if (first == 0) before = 0;
  u64 even = upTo(part * first + 2 * lane), odd = upTo(part * first + 2 * lane + 1);
  int pair = __ffs(__ballot_sync(~0u, odd >= target)) - 1;
  u64 earlier = __shfl_sync(~0u, odd, max(pair - 1, 0)), half = __shfl_sync(~0u, even, pair);
  if (pair == 0) earlier = before;
  if (lane) return;
  s.bucket = part * first + 2 * pair + (half < target);
  s.before = half < target ? half : earlier;
}

/** Rounded down by an addition: a conversion takes longer. */
__device__ __forceinline__ int bucketAt(float distance) {
  float at = fminf(distance * BUCKETS_PER_NAT, BUCKETS - 1);
  return (int)(__float_as_uint(__fadd_rz(at, 8388608.f)) & (BUCKETS - 1));
}

/**
 * The largest key at which the masses of all tokens with keys not below it reach targetOf(sum of
 * all); LEAST_KEY if they never do.
 * view: takes(x, id), key(x), distance(x) ≥ 0, which falls as keys rise, distanceOf(key), mass(x).
 * bound: if not 0, no border is below this key, and tokens from it on are probably few.
 * farthest: no border is at a larger distance.
 */
template <typename View, typename Target>
__device__ __forceinline__ Border border(Team& team, const Row& row, Search& s, List& list,
                                         const View& view, u32 bound, float farthest,
                                         Target targetOf) {
  u32 low = bound, high = ~0u;
  // Distances of those keys; who is outside is not looked at.
  float near = 0, far = bound ? view.distanceOf(bound) : farthest;
  u64 before = 0, target = 0;
  bool histogram = !bound, byDistance = true, known = false;
  for (;;) {
    int shift = max(0, 21 - __clz(high - low)), bucket = 0;
    /** -1: nowhere. */
    auto bucketOf = [&](float x, float distance) {
      if (!histogram) return view.key(x) >= low ? 0 : -1;
      if (byDistance) return bucketAt(distance);
      u32 key = view.key(x);
      return key < low || key > high ? -1 : (int)((high - key) >> shift);
    };
    /** A pass has ended: the first one's sum is that of all. */
    auto meet = [&](u64 sum) {
      team.meet(warpSum64(sum));
      if (known) return true;
      known = true;
      u64 total = team.sum();
      target = targetOf(total);
      return target <= total;
    };
    if (histogram) {
      s.mass[2 * threadIdx.x] = s.mass[2 * threadIdx.x + 1] = 0;
      __syncthreads();
      u64 sum = 0;
      row.each([&](float x, int id) {
        float distance = view.distance(x);
        bool inside = distance >= near && distance <= far;
        if ((known && !inside) || !view.takes(x, id)) return;
        u64 mass = view.mass(x);
        sum += mass;
        if (!inside) return;
        int at = bucketOf(x, distance);
        if (at >= 0) add(s, at, mass);
      });
      __syncthreads();
      sumBuckets(s);
      if (!meet(sum)) break;
      if (threadIdx.x < 32) findBucket(team.size, s, target - before);
      __syncthreads();
      bucket = s.bucket, before += s.before;
      if (byDistance) {
        near = bucket / BUCKETS_PER_NAT;
        far = bucket == BUCKETS - 1 ? INFINITY : (bucket + 1) / BUCKETS_PER_NAT;
      }
    }
    u64 sum = 0;
    u32 lowest = ~0u, highest = 0;
    row.each([&](float x, int id) {
      float distance = view.distance(x);
      if (distance < near || distance > far || bucketOf(x, distance) != bucket) return;
      if (!view.takes(x, id)) return;
      u32 key = view.key(x);
      u64 mass = view.mass(x);
      sum += mass;
      list.add(key, mass);
      lowest = min(lowest, key), highest = max(highest, key);
    });
    list.range(lowest, highest);
    if (!meet(sum)) break;
    Gathered found = list.gather(team);
    if (found.count <= LISTED) {
      list.rank(found.count, [&](Entry entry, u64 larger, u64 equal, int, int same) {
        u64 above = before + larger;
        if (above < target && above + equal >= target) {
          s.found = {(u32)entry.key, same, above, target};
        }
      });
      __syncthreads();
      return s.found;
    }
    low = found.low, high = found.high;
    if (low == high) return {low, MANY, before, target};
    near = view.distanceOf(high), far = view.distanceOf(low);
    byDistance = !histogram;
    histogram = true;
  }
  return {LEAST_KEY, MANY, 0, target};
}
