// Owns the reading of weights through a whole step: a warp asks for its rows, a segment at a time,
// as far ahead as its slots of shared memory go, whatever phase they belong to. Weights depend on
// nothing, so memory stays busy while phases wait for each other:
//
//   memory    …|qkv 0|output 0   |gate and up 0      |down 0     |qkv 1|output 1 …
//   products     …|qkv 0| · · · |output 0|·|gate and up 0   |·|down 0  |·|qkv 1| …
//                        attention        ↑ all blocks wait for all; what is read meanwhile lies
//                                           in shared memory, 192 KiB a multiprocessor
//
// Before: -D SLOTS of a warp, SEGMENT bytes each (a multiple of 512), TAKEN, HOLD, and those of
// phases.cuh.
#pragma once
#include "phases.cuh"

constexpr int SEGMENT_CHUNKS = SEGMENT / 16;

#if __CUDA_ARCH__ >= 900
/** Copies `bytes` (a multiple of 16) that are read once: they leave L2 first. */
__device__ __forceinline__ void copyOnce(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("{ .reg .b64 p; createpolicy.fractional.L2::evict_first.b64 p, 1.0;"
               "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1], %2, [%3], p; }" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
#endif

__device__ __forceinline__ float dot8(uint4 w, uint4 x, float sum) {
  sum = fmaf(low(w.x), low(x.x), sum), sum = fmaf(high(w.x), high(x.x), sum);
  sum = fmaf(low(w.y), low(x.y), sum), sum = fmaf(high(w.y), high(x.y), sum);
  sum = fmaf(low(w.z), low(x.z), sum), sum = fmaf(high(w.z), high(x.z), sum);
  return fmaf(high(w.w), high(x.w), fmaf(low(w.w), low(x.w), sum));
}

/**
 * One for each warp; every lane follows the same way.
 *
 * Most items are dealt to the warps of all blocks in turn, from phase to phase, too: what is read
 * at one time lies together. The last TAKEN percent of a long phase go to whoever is first:
 * multiprocessors do not read equally fast.
 *
 * Of later phases a warp asks for HOLD segments only, until its block has signalled that it is done
 * with this one: signals and results would queue behind what is asked for, for 2–4 µs a phase.
 */
class WeightStream {
  const Phase* phases;
  const int count;
  /** By phase, how many items were taken. */
  u32* const tickets;
  /** This warp's slots, a barrier for each (full when its phase ends), and what is in them. */
  const unsigned char* slots;
  const u32 full;
  int2* const contents;
  /** Where the next segment is taken from, and where the next one that is asked for goes. */
  int slot = 0, in = 0;
  u32 parity = 0;
  /** The phase being done; segments of later ones asked for during it; and those put off. */
  int present = 0, ahead = 0, owed = 0;
  /** What the next request asks for; `phase` is `count` at the end. */
  int phase = -1, item = 0, rowBytes = 0, at = 0;
  bool second = false;
  /** From an item of a warp to its next; items of the phase that are dealt; whose turn it is. */
  const int step = WARPS * gridDim.x;
  int fixed = 0, dealt = 0;
  /** In lane 0, the item that was taken to come after this one. */
  int taken = 0;
  Items items;
  const unsigned char *weight = nullptr, *row = nullptr;

 public:
  /** Asks for as many segments as there are slots. */
  __device__ __forceinline__ WeightStream(const Phase* phases, int count, u32* tickets,
                                          unsigned char* ring, u64* barriers, int2* contents)
      : phases(phases), count(count), tickets(tickets),
        slots(ring + threadIdx.x / 32 * SLOTS * SEGMENT),
        full(address(barriers + threadIdx.x / 32 * SLOTS)),
        contents(contents + threadIdx.x / 32 * SLOTS), items(phases[0]) {
    if (threadIdx.x % 32 == 0) {
      for (int s = 0; s < SLOTS; s++) barrierInit(full + s * 8, COPIERS);
    }
    barriersReady();
    nextPhase();
    for (int s = 0; s < SLOTS; s++) request();
  }

  /** The warp's next item of a phase; -1 if it has no more. */
  __device__ __forceinline__ int next(int phase) const {
    if (owed == SLOTS) return -1;
    const int2 content = contents[slot];
    return content.x == phase ? content.y : -1;
  }

  /** Now phase `p` is being done: what was put off is asked for. */
  __device__ __forceinline__ void proceed(int p) {
    present = p;
    ahead = 0;
    for (; owed > 0; owed--) ask();
  }

  /** The product of the next row with TOKENS inputs of k elements: lane t has token t's. */
  __device__ __forceinline__ float dot(const uint4* input, int k) {
    const int lane = threadIdx.x % 32, chunks = k / 8;
    // Two of each: a sum would wait for the one before it.
    float sums[2][TOKENS] = {};
    for (int first = 0; first < chunks; first += SEGMENT_CHUNKS) {
      barrierWait(full + slot * 8, parity);
      const uint4* w = (const uint4*)(slots + slot * SEGMENT);
      const uint4* x = input + first;
      if (first + SEGMENT_CHUNKS <= chunks) {
#pragma unroll
        for (int i = 0; i < SEGMENT_CHUNKS / 32; i++) add(sums[i % 2], w, x, i * 32 + lane, chunks);
      } else {
        for (int i = lane; i < chunks - first; i += 32) add(sums[0], w, x, i, chunks);
      }
      __syncwarp();
      request();
      if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
    float own = 0.f;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      const float sum = warpSum(sums[0][t] + sums[1][t]);
      if (lane == t) own = sum;
    }
    return own;
  }

 private:
#if __CUDA_ARCH__ >= 900
  static constexpr int COPIERS = 1;
#else
  static constexpr int COPIERS = 32;
#endif

  __device__ __forceinline__ static void add(float (&sums)[TOKENS], const uint4* w, const uint4* x,
                                             int i, int chunks) {
    const uint4 part = w[i];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) sums[t] = dot8(part, x[t * chunks + i], sums[t]);
  }

  /** Asks for what is next, unless that has to wait for `proceed`. */
  __device__ __forceinline__ void request() {
    if (phase > present && ++ahead > HOLD) owed++;
    else ask();
  }

  __device__ __forceinline__ void ask() {
    const int into = in;
    if (++in == SLOTS) in = 0;
    // Every lane writes what it will read.
    contents[into] = make_int2(phase, item);
    if (phase == count) return;
    const int lane = threadIdx.x % 32, bytes = min(SEGMENT, rowBytes - at);
    const u32 to = address(slots + into * SEGMENT), barrier = full + into * 8;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
      barrierExpect(barrier, bytes);
      copyOnce(to, row + at, bytes, barrier);
    }
#else
    for (int i = lane * 16; i < bytes; i += 512) copy16(to + i, row + at + i);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
    at += SEGMENT;
    if (at < rowBytes) return;
    at = 0;
    second = items.pairs() && !second;
    if (second) return findRow();
    item = item + step < fixed ? item + step : __shfl_sync(~0u, taken, 0);
    if (item < items.count()) begin();
    else nextPhase();
  }

  __device__ __forceinline__ void findRow() {
    const int2 rows = items.rowsOf(item);
    row = weight + (u64)(second ? rows.y : rows.x) * rowBytes;
  }

  /** What comes after the last dealt item is taken before it is needed. */
  __device__ __forceinline__ void begin() {
    if (item + step >= fixed) take();
    findRow();
  }

  __device__ __forceinline__ void take() {
    const int all = items.count();
    if (threadIdx.x % 32 == 0) taken = fixed < all ? fixed + atomicAdd(tickets + phase, 1) : all;
  }

  __device__ __forceinline__ void nextPhase() {
    do {
      if (++phase == count) return;
      const Phase& next = phases[phase];
      items = Items(next);
      weight = (const unsigned char*)next.weight;
      rowBytes = next.k * 2;
      fixed = items.count();
      if (fixed >= 8 * step) fixed -= fixed * TAKEN / 100;
      item = threadIdx.x / 32 * gridDim.x + blockIdx.x - dealt;
      if (item < 0) item += step;
      dealt = (dealt + fixed) % step;
      if (item < fixed) continue;
      take();
      item = __shfl_sync(~0u, taken, 0);
    } while (item >= items.count());
    begin();
  }
};
