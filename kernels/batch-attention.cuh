// Owns attention as a phase of a decode step of many tokens. Each warpgroup that multiplies takes a
// stretch of the line of tiles (attention-tiles.cuh), from a sequence's oldest tokens to its
// newest: only these have to wait for the phase before, and older ones fill the ring meanwhile.
//
// Before: -D HEADS KV_HEADS HEAD_DIM GROUP WARPS (4) and those of batch-phases.cuh
#pragma once
#include "attention-tiles.cuh"
#include "batch-phases.cuh"

constexpr int TILE_PAGES = 2 * PANELS;
constexpr int WORKERS = CONSUMERS / (WARPS * 32);
/** Of a column, and of all, in a lane that has a share of a result. */
constexpr int WORDS = 4 + SHARE * 4, PART_WORDS = COLUMNS * WORDS;
constexpr int AREA_BYTES = WORKERS * WARPS * WHOLE * 16;

static_assert(PANEL == PAGE && HEAD_DIM % 64 == 0, "a panel is a page");

/** Tokens that the copy engine brings at once of a tile that is not full: those of a warp. */
constexpr int BOX_TOKENS = 16;

/** Read once: it leaves L2 first, where what blocks hand each other has to stay. */
constexpr u64 ONCE = 0x12F0000000000000ull;

__device__ __forceinline__ void loadKeys(u32 to, const void *map, int x, int y, int z, int w,
                                         u32 barrier) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
               ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to), "l"(map),
               "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier), "l"(ONCE) : "memory");
}

/** What attention needs besides the table. */
struct Attending {
  const unsigned char *kv;
  const int *slots, *lengths;
  int rows;
  u64 slotStride, tokenStride;
  float scale;
  /** [worker, warp, PART_WORDS / 2, lane]: parts of results, each word with its tag. */
  ulonglong2 *parts;

  __device__ __forceinline__ Arguments of(const Phase &p) const {
    return {p.q, (bf16 *)p.out, p.in, kv, slots, lengths, rows, p.window, p.headRow, slotStride,
            tokenStride, scale, 0.f, nullptr, nullptr};
  }
  /** Of a few workers less, if equal sequences' heads are then whole: nothing is to be merged. */
  __device__ __forceinline__ Walk walk(const Arguments &a, int worker) const {
    const u32 all = gridDim.x * WORKERS, heads = rows * KV_HEADS;
    const u32 each = (heads + all - 1) / all, some = (heads + each - 1) / each;
    return Walk(a, blockIdx.x * WORKERS + worker, some * 25 >= all * 24 ? some : all);
  }
};

/** Tiles of all workers of this block. */
__device__ __forceinline__ int tilesOf(const Phase &p, const Attending &attending) {
  const Arguments a = attending.of(p);
  int tiles = 0;
  for (int w = 0; w < WORKERS; w++) {
    const Walk walk = attending.walk(a, w);
    tiles += walk.end - walk.at;
  }
  return tiles;
}

/** A sequence that is shorter than a tile: beyond its ends may be what is not mapped. */
__device__ __forceinline__ void copyShort(const Arguments &a, const Piece &p, int token,
                                          const Ring &ring, const Place &at) {
  const int lane = threadIdx.x % 32, row = a.headRow + p.kvHead;
  constexpr int CHUNKS = HEAD_DIM / 8;
  const unsigned char *keys =
      a.kv + (u64)a.slots[p.row] * a.slotStride + (u64)row * (HEAD_DIM * 2);
  for (int i = 0; i < TILE_PAGES; i++) ring.awaitEmpty(at.after(i));
  __syncwarp();
  for (int i = lane; i < 2 * TILE * CHUNKS && p.length > 0; i += 32) {
    const int chunk = i % CHUNKS, t = i / CHUNKS % TILE, values = i >= TILE * CHUNKS;
    const u32 to = ring.at(at.after(values * PANELS + chunk / 8));
    copy16(to + t * 128 + ((chunk ^ t) & 7) * 16,
           keys + (u64)max(token + t, p.first) * a.tokenStride +
               values * (KV_HEADS * HEAD_DIM * 2) + chunk * 16);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
  if (lane < TILE_PAGES) barrierArrive(ring.fullOf(at.after(lane)));
}

/** Where a worker is on its stretch. */
struct Stretch {
  Walk walk;
  Piece piece;
  int tile;
  bool some;

  __device__ __forceinline__ Stretch(const Attending &attending, const Arguments &a, int worker)
      : walk(attending.walk(a, worker)) {
    some = walk.next(piece);
    tile = some ? piece.tile : 0;
  }
  /** Tiles of a piece are counted from the oldest here, from the newest in `firstToken`. */
  __device__ __forceinline__ int fromNewest() const { return piece.all - 1 - tile; }
  __device__ __forceinline__ void advance() {
    if (++tile < piece.tile + piece.tiles) return;
    some = walk.next(piece);
    tile = piece.tile;
  }
};

/** Brings keys and values: a tile of each worker in turn. */
template <typename Hold>
__device__ __forceinline__ void feedKeys(const Phase &p, int n, bool first,
                                         u32 *all, const Attending &attending,
                                         const Ring &ring, Place &at, Hold &hold) {
  const int lane = threadIdx.x % 32;
  awaitInputs();
  const Counters counters(all);
  const Arguments a = attending.of(p);
  Stretch stretch[WORKERS] = {Stretch(attending, a, 0), Stretch(attending, a, 1)};
  bool appended = first;
  while (stretch[0].some || stretch[1].some) {
#pragma unroll
    for (int w = 0; w < WORKERS; w++) {
      Stretch &s = stretch[w];
      if (!s.some) continue;
      const int token = firstToken(s.piece, s.fromNewest());
      hold.take(TILE_PAGES);
      if (s.fromNewest() == 0 && !appended) {
        if (lane == 0) counters.await(n - 1, p.arrivals);
        __syncwarp();
        appended = true;
      }
      if (token < 0) {
        copyShort(a, s.piece, token, ring, at);
      } else if (lane < TILE_PAGES) {
        const Place place = at.after(lane);
        const int headRow = a.headRow + s.piece.kvHead + lane / PANELS * KV_HEADS;
        // What comes before the sequence, or is the next tile's, is left out where whole boxes are.
        const int seen = min(TILE, s.piece.length - s.fromNewest() * TILE);
        const int boxes = (seen + BOX_TOKENS - 1) / BOX_TOKENS;
        ring.awaitEmpty(place);
        barrierExpect(ring.fullOf(place), boxes * BOX_TOKENS * 128);
        const int slot = a.slots[s.piece.row], x = lane % PANELS * 64;
        if (boxes == TILE / BOX_TOKENS) {
          loadKeys(ring.at(place), p.four, x, headRow, token, slot, ring.fullOf(place));
        } else {
          for (int i = 0; i < boxes; i++) {
            loadKeys(ring.at(place) + i * BOX_TOKENS * 128, a.map, x, headRow,
                     token + i * BOX_TOKENS, slot, ring.fullOf(place));
          }
        }
      }
      __syncwarp();
      at.advance(TILE_PAGES);
      s.advance();
    }
  }
}

/** A word and what says of which phase it is: one store, so nobody sees only one of them. */
__device__ __forceinline__ u64 tagged(float x, u32 tag) {
  return (u64)tag << 32 | __float_as_uint(x);
}

/** Words of a warp's share of a result, in a lane: maxima, totals, sums. */
template <typename Act> __device__ __forceinline__ void eachWord(Sums<SHARE> &sums, Act act) {
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) {
    act(c * WORDS, sums.m[c][0], sums.m[c][1]);
    act(c * WORDS + 2, sums.l[c][0], sums.l[c][1]);
#pragma unroll
    for (int s = 0; s < SHARE; s++) {
      act(c * WORDS + 4 + s * 4, sums.o[c][s][0], sums.o[c][s][1]);
      act(c * WORDS + 6 + s * 4, sums.o[c][s][2], sums.o[c][s][3]);
    }
  }
}

__device__ __forceinline__ void give(ulonglong2 *to, Sums<SHARE> &sums, u32 tag) {
  eachWord(sums, [&](int i, float x, float y) {
    asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(to + i / 2 * 32),
                 "l"(tagged(x, tag)), "l"(tagged(y, tag)) : "memory");
  });
}

/** Waits for another worker's part, and adds it. */
__device__ __forceinline__ void receive(const ulonglong2 *from, Sums<SHARE> &sums, u32 tag) {
  Sums<SHARE> other;
  bool all = false;
  for (u32 spins = 0; !all; spins++) {
    all = true;
    eachWord(other, [&](int i, float &x, float &y) {
      ulonglong2 v;
      asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y)
                   : "l"(from + i / 2 * 32) : "memory");
      x = __uint_as_float((u32)v.x), y = __uint_as_float((u32)v.y);
      all = all && v.x >> 32 == tag && v.y >> 32 == tag;
    });
    if (spins == SPINS_MAX) __trap();
  }
  sums.add(other);
}

/** The warps of a worker wait for each other. */
__device__ __forceinline__ void meetWorker(int worker) {
  asm volatile("bar.sync %0, %1;" ::"r"(2 + worker), "n"(WARPS * 32) : "memory");
}

/**
 * area: this worker's, of WARPS · WHOLE; progress: tiles that each worker has seen, 0 at first;
 * tag: of no other phase of any step; awaitBefore: until the phase before is done. `at` moves on.
 */
template <typename AwaitBefore>
__device__ __forceinline__ void attendStretch(const Phase &p, const Attending &attending,
                                              const Ring &ring, Place &at, float4 *area,
                                              volatile int *progress, u32 tag,
                                              AwaitBefore awaitBefore) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % WARPS;
  const int worker = threadIdx.x / (32 * WARPS);
  const Arguments a = attending.of(p);
  const Walk theirs = attending.walk(a, 1 - worker);
  Walk walk = attending.walk(a, worker);
  const int tiles = walk.end - walk.at, others = theirs.end - theirs.at;
  // Tiles of both take turns in the ring until one has no more.
  auto placeOf = [&](int tile) {
    const int before = worker == 0 ? min(tile, others) : min(tile + 1, others);
    Place place = at;
    place.advanceFar((tile + before) * TILE_PAGES);
    return place;
  };
  // The last of the other's tiles that had a page before this tile's has it.
  auto seenByOther = [&](int tile) {
    const int last = (2 * tile + worker + 1) * TILE_PAGES - 1 - PAGES;
    const int first = (1 - worker) * TILE_PAGES;
    return last < first ? 0 : min(others, (last - first) / (2 * TILE_PAGES) + 1);
  };
  auto partOf = [&](u32 of) {
    return attending.parts + (of * WARPS + warp) * (PART_WORDS / 2 * 32) + lane;
  };
  int done = 0;
  awaitBefore();
  Piece piece;
  while (walk.next(piece)) {
    const int firstK = piece.kvHead * GROUP * HEAD_DIM;
    const u64 group = (u64)piece.row * (HEADS * HEAD_DIM) + firstK;
    u32 q[COLUMNS][STEPS][2];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      const int head = c * 8 + lane / 4;
      const u32 *from = (const u32 *)(a.q + group + head * HEAD_DIM) + lane % 4;
#pragma unroll
      for (int k = 0; k < STEPS; k++)
        for (int i = 0; i < 2; i++) q[c][k][i] = head < GROUP ? freshWord(from + k * 8 + i * 4) : 0;
    }
    Sums<STEPS> state;
    state.clear();
    for (int j = piece.tile; j < piece.tile + piece.tiles; j++, done++) {
      const int tile = piece.all - 1 - j, from = firstToken(piece, tile);
      const int begin = piece.first - from, end = piece.length - tile * TILE - from;
      const Place place = placeOf(done);
      // Otherwise what is in a page could be taken for what is to come.
      while (progress[1 - worker] < seenByOther(done)) {}
      awaitPages(ring, place, TILE_PAGES);
      if (threadIdx.x % (32 * WARPS) == 0) progress[worker] = done + 1;
      u32 keys[PANELS], values[PANELS];
#pragma unroll
      for (int i = 0; i < PANELS; i++) {
        keys[i] = ring.at(place.after(i));
        values[i] = ring.at(place.after(PANELS + i));
      }
      // Tokens of a warp that sees none of them need not be there.
      if (warp * 16 < end) attend(a, state, keys, values, warp * 16, q, begin, end);
      // For the other worker's warps, too, who have no use for this tile.
      release(ring, place, TILE_PAGES);
      release(ring, place, TILE_PAGES);
    }
    state.total();
    // From here on a warp has all tokens, for its share of the dimensions.
    Sums<SHARE> sums;
    const int first = warp * SHARE;
    state.store(area + warp * WHOLE);
    meetWorker(worker);
    sums.gather<STEPS>(WARPS, [&](int w) { return area + w * WHOLE; }, first);
    meetWorker(worker);
    if (piece.tiles < piece.all) {
      // Whoever has the first part has it at the end of its stretch, and the others' are there.
      if (piece.tile > 0) {
        give(partOf(walk.worker), sums, tag);
        continue;
      }
      const u32 last = walk.blockOf(piece.start + piece.all - 1);
      for (u32 w = walk.worker + 1; w <= last; w++) receive(partOf(w), sums, tag);
    }
    sums.output<E4M3>(a.out + inputPlace(piece.row, firstK), first, TOKENS * STEP);
  }
  at.advanceFar((tiles + others) * TILE_PAGES);
}
