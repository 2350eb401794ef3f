// Owns a row of logits as the threads of its blocks see it: every warp has a run of it, in order of
// ids, which it alone looks at, four tokens a lane. As much of a run as there is room for lies in
// shared memory; the rest is read again in each pass, from L2. So a row costs its 513 KB (of
// 128,256 tokens) once if its blocks can hold it, which 4 can and 2 cannot quite: 75 %.
#pragma once
#include "cluster.cuh"

#define AHEAD 4  // loads of a lane that are under way at once

/** Four logits from memory; rows need not begin at multiples of 16 bytes, nor end there. */
__device__ __forceinline__ float4 fourOf(const float* row, int i, int vocab) {
  if (vocab % 4 == 0) return *(const float4*)(row + i);
  return make_float4(row[i], i + 1 < vocab ? row[i + 1] : -INFINITY,
                     i + 2 < vocab ? row[i + 2] : -INFINITY,
                     i + 3 < vocab ? row[i + 3] : -INFINITY);
}

__device__ __forceinline__ void copyAsync(float4* to, const float4* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(placeOf(to)), "l"(from)
               : "memory");
}
__device__ __forceinline__ void intoL2(const float* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}
__device__ __forceinline__ void copiesOrdered() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/** Waits for this thread's copies: for all, or for those of the first half. */
__device__ __forceinline__ void copiesDone(bool all) {
  if (all) asm volatile("cp.async.wait_group 0;" ::: "memory");
  else asm volatile("cp.async.wait_group 1;" ::: "memory");
}

struct Row {
  /** The model's logits; those that biases and penalties made, or null if they are the same. */
  const float* raw;
  float* adjusted;
  /** Of all warps, and what of it this one has; where a token is in it: `placeOf`. */
  float4* held;
  int vocab;
  /** Groups of four tokens: of a run, held of a run, this run's; up to `heldEnd` they are held. */
  int perRun, perHeld, first, last, heldEnd;

  __device__ Row(const float* raw, int vocab, float4* held, u32 bytes, const Team& team)
      : raw(raw), adjusted(nullptr), held(held), vocab(vocab) {
    int groups = (vocab + 3) / 4, runs = team.size * WARPS;
    // Runs begin at multiples of 128 bytes.
    perRun = ((groups + runs - 1) / runs + 7) & ~7;
    int room = bytes / (WARPS * sizeof(float4));
    perHeld = room >= perRun ? perRun : room & ~31;
    first = min(groups, team.self() * perRun), last = min(groups, first + perRun);
    heldEnd = min(last, first + perHeld);
  }

  __device__ __forceinline__ float4& heldAt(int g) const {
    return held[(threadIdx.x >> 5) * perHeld + g - first];
  }

  /** A group of four; -Infinity where there are no tokens. */
  __device__ __forceinline__ float4 at(int g) const {
    return g < heldEnd ? heldAt(g) : fourOf(adjusted ? adjusted : raw, 4 * g, vocab);
  }
  /** Orders what will be held; `arrived` of this thread's part, first half (1) or all of it (0). */
  __device__ void order() const {
    for (int half = 0; half < 2; half++) {
#pragma unroll 4
      for (int g = start(half); g < endOf(half); g += 32) {
        if (vocab % 4) heldAt(g) = fourOf(raw, 4 * g, vocab);
        else copyAsync(&heldAt(g), (const float4*)raw + g);
      }
      copiesOrdered();
    }
    for (int g = tail(); g < last; g += 32) intoL2(raw + 4 * g);
  }
  /** Where this thread's groups begin in either half of what is held, and where that half ends. */
  __device__ __forceinline__ int start(int half) const {
    return (half ? endOf(0) : first) + (threadIdx.x & 31);
  }
  __device__ __forceinline__ int endOf(int half) const {
    return half ? heldEnd : min(first + perHeld / 64 * 32, heldEnd);
  }
  /** The first of this thread's groups that is not held. */
  __device__ __forceinline__ int tail() const { return heldEnd + (threadIdx.x & 31); }
  /** Only what changes needs to be written where it is not held. */
  __device__ __forceinline__ void put(int g, float4 x) const {
    if (g < heldEnd) {
      heldAt(g) = x;
    } else if (adjusted) {
      auto one = [&](int i, float value) {
        if (i < vocab) adjusted[i] = value;
      };
      one(4 * g, x.x), one(4 * g + 1, x.y), one(4 * g + 2, x.z), one(4 * g + 3, x.w);
    }
  }
  /** Where a token of this block is; null if it is another block's. */
  __device__ float* placeOf(int token, const Team& team) const {
    int g = token / 4, run = g / perRun, inRun = g - run * perRun, warp = run - team.rank * WARPS;
    if (warp < 0 || warp >= WARPS) return nullptr;
    if (inRun >= perHeld) return adjusted + token;
    return &held[warp * perHeld + inRun].x + token % 4;
  }

  /** look(logit, id) for all tokens of this thread, and those of -Infinity that fill its last. */
  template <typename Look>
  __device__ __forceinline__ void each(Look look) const {
    int g = first + (threadIdx.x & 31);
    if (g >= last) return;
    float4 x = at(g);
#pragma unroll 1
    for (;;) {
      float4 next = x;
      if (g + 32 < last) next = at(g + 32);
      look(x.x, 4 * g), look(x.y, 4 * g + 1), look(x.z, 4 * g + 2), look(x.w, 4 * g + 3);
      g += 32;
      if (g >= last) return;
      x = next;
    }
  }
};

/** AHEAD groups of a lane, 32 apart, that are on their way from memory. */
struct Batch {
  float4 x[AHEAD];
  __device__ __forceinline__ void load(const float* from, const Row& row, int g) {
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      if (g + 32 * k < row.last) x[k] = fourOf(from, 4 * (g + 32 * k), row.vocab);
    }
  }
};

/**
 * In order of ids, the token at which the sum of mass(logit, id) exceeds targetOf(sum of all): in
 * all lanes of the warp that has it, -1 in others. Meets once.
 */
template <typename Mass, typename Target>
__device__ __forceinline__ int locate(Team& team, const Row& row, Mass mass, Target targetOf) {
  u64 sum = 0;
  row.each([&](float x, int id) { sum += mass(x, id); });
  sum = warpSum64(sum);
  team.exchange(sum);
  u64 target = targetOf(team.sum()), before = team.sumBefore(team.self());
  if (target < before || target - before >= sum) return -1;
  int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int base = row.first;; base += 32) {
    int g = base + lane;
    u64 a = 0, b = 0, c = 0, d = 0;
    if (g < row.last) {
      float4 x = row.at(g);
      a = mass(x.x, 4 * g), b = mass(x.y, 4 * g + 1);
      c = mass(x.z, 4 * g + 2), d = mass(x.w, 4 * g + 3);
    }
    u64 prefix = before + warpPrefix64(a + b + c + d);
    u32 reached = __ballot_sync(~0u, prefix > target);
    if (reached) {
      prefix -= d;
      int past = prefix - c - b > target ? 0 : prefix - c > target ? 1 : prefix > target ? 2 : 3;
      int id = 4 * g + past;
      return __shfl_sync(~0u, id, __ffs(reached) - 1);
    }
    before = __shfl_sync(~0u, prefix, 31);
  }
}
