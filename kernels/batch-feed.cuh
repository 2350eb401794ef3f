// Owns what feeds the ring of a decode step of many tokens: one warp asks for weights, as far ahead
// as the ring goes, another for the tokens beside them as soon as the phase before is done.
//
// Before: -D HOLD pages and those of batch-phases.cuh and batch-attention.cuh.
#pragma once
#include "batch-attention.cuh"

/** How long L2 is to keep what the copy engine reads. */
constexpr u64 OFTEN = 0x14F0000000000000ull, AS_USUAL = 0x1000000000000000ull;

/** A box of 128 bytes by 8 rows by both halves of groups. */
__device__ __forceinline__ void loadGroups(u32 to, const void *map, int k, int group, int head,
                                           u32 barrier, u64 keep) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
               ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(to), "l"(map),
               "r"(k), "r"(0), "r"(0), "r"(group), "r"(head), "r"(barrier), "l"(keep) : "memory");
}

__device__ __forceinline__ void loadTokens(u32 to, const void *map, int step, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
               ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to), "l"(map), "r"(0),
               "r"(0), "r"(step), "r"(barrier), "l"(OFTEN) : "memory");
}

/** Lane i brings page i of a step: groups from 4·i on. */
__device__ __forceinline__ void feedPage(const Phase &p, const Ring &ring, const Place &place,
                                         int group, int groups, int step) {
  const u32 full = ring.fullOf(place), to = ring.at(place);
  ring.awaitEmpty(place);
  barrierExpect(full, groups * GROUP_BYTES);
  const int heads = p.headGroups;
  // Beside what leaves L2 first, logits are written a tenth slower: 414 µs instead of 377.
  const u64 keep = p.kind == LOGITS ? AS_USUAL : ONCE;
  const int k = step * STEP * p.inputs();
  if (groups == PAGE_GROUPS && (heads == 0 || group % PAGE_GROUPS == 0)) {
    const int head = heads ? group / heads : 0;
    return loadGroups(to, p.four, k, group - head * heads, head, full, keep);
  }
  for (int i = 0; i < groups; i++, group++) {
    const int head = heads ? group / heads : 0;
    loadGroups(to + i * GROUP_BYTES, p.one, k, group - head * heads, head, full, keep);
  }
}

/**
 * Of a phase, HOLD pages only are asked for until the block has signalled that the one before is
 * done: its signal would queue behind them.
 */
struct Hold {
  u32 done;
  u32 parity;
  int left;

  __device__ __forceinline__ void take(int pages) {
    if (left < 0) return;
    left -= pages;
    if (left < 0) barrierWait(done, parity);
  }
};

/** done: a barrier whose phases end when the block has signalled. */
__device__ __forceinline__ void feedWeights(const Phase *phases, int first, int end, u32 *counters,
                                            const Attending &attending, const Ring &ring,
                                            u32 done) {
  const int lane = threadIdx.x % 32;
  Place at;
  for (int n = first; n < end; n++) {
    const Phase p = phases[n];
    if (n + 1 < end && lane == 0) {
      prefetchMap(phases[n + 1].four);
      prefetchMap(phases[n + 1].one);
      prefetchMap(phases[n + 1].in);
    }
    Hold hold = {done, (u32)(n - first - 1) & 1, n == first ? -1 : HOLD};
    if (p.kind == ATTENTION) {
      feedKeys(p, n, n == first, counters, attending, ring, at, hold);
      continue;
    }
    const Share share(p);
    for (int group = share.from; group < share.to; group += ROUND_GROUPS) {
      const int groups = min(ROUND_GROUPS, share.to - group);
      const int pages = (groups + PAGE_GROUPS - 1) / PAGE_GROUPS;
      for (int step = share.firstStep; step < share.endStep; step++) {
        hold.take(pages);
        const int mine = min(PAGE_GROUPS, groups - lane * PAGE_GROUPS);
        if (mine > 0) {
          feedPage(p, ring, at.after(lane), group + lane * PAGE_GROUPS, mine, step);
        }
        __syncwarp();
        at.advance(pages + p.inputs());
      }
    }
  }
}

__device__ __forceinline__ void feedTokens(const Phase *phases, int first, int end,
                                           const Counters &counters, const Attending &attending,
                                           const Ring &ring) {
  Place at;
  for (int n = first; n < end; n++) {
    const Phase p = phases[n];
    if (p.kind == ATTENTION) {
      at.advanceFar(tilesOf(p, attending) * TILE_PAGES);
      continue;
    }
    const Share share(p);
    if (!share.some) continue;
    if (threadIdx.x % 32 == 0) {
      prefetchMap(p.in);
      if (n > first) counters.await(n - 1, p.arrivals);
    }
    for (int group = share.from; group < share.to; group += ROUND_GROUPS) {
      const int pages = (min(ROUND_GROUPS, share.to - group) + PAGE_GROUPS - 1) / PAGE_GROUPS;
      for (int step = share.firstStep; step < share.endStep; step++) {
        for (int i = 0; i < p.inputs() && threadIdx.x % 32 == 0; i++) {
          const Place place = at.after(pages + i);
          ring.awaitEmpty(place);
          barrierExpect(ring.fullOf(place), INPUT_BYTES);
          loadTokens(ring.at(place), p.in, step * p.inputs() + i, ring.fullOf(place));
        }
        __syncwarp();
        at.advance(pages + p.inputs());
      }
    }
  }
}
