// Owns causal attention of stretches of sequences over their keys and values in strided memory, on
// Hopper (9.0), with its copy engine and warpgroup products. Elsewhere: attention-prefill.cu.
//
// q, out  [rows, heads, HEAD_DIM] bf16; the GROUP query heads of a key/value head are neighbours.
// kv      address(slot, token) = kv + slot·slotStride + token·tokenStride, in bytes; row headRow of
//         HEAD_DIM bf16 is there the layer's first key; KV_HEADS keys come before as many values.
// map     the same memory as a tensor map of [slots, tokens, layers · 2 · KV_HEADS, HEAD_DIM] bf16
//         with boxes of [1, KEYS, 1, 64], swizzled by 128 bytes.
// firstRows, starts, counts, slots  [segments] int32, as in attention-prefill.cu.
//
// FlashAttention-3 (Shah et al. 2024): one warpgroup feeds the others, which take turns at the
// tensor cores, one in its softmax while another multiplies, and each multiplies the last tile's
// weights with values while it computes the next tile's scores. A tile of keys that reaches beyond
// the segment's end, into memory that may not be mapped, is copied without the copy engine.
// Sums and softmax are float32: ‖error‖ ≤ 1e-2 of bf16 results, oracle test/cuda/attention.ts.
//
// -D HEAD_DIM GROUP KV_HEADS KEYS (tokens a tile) WORKERS (warpgroups) STAGES QUERY_STAGES
//    [SOFTCAP]

#include "wgmma.cuh"

static_assert(HEAD_DIM % 64 == 0, "the copy engine takes whole panels");

constexpr int ROWS = 64 * WORKERS;
constexpr int TILE_TOKENS = (ROWS + GROUP - 1) / GROUP;
constexpr int PANELS = HEAD_DIM / 64;  // of 64 columns, 128 bytes
constexpr int QUERY_PANEL = ROWS * 128;
constexpr int KEY_PANEL = KEYS * 128;
constexpr int QUERY_BYTES = PANELS * QUERY_PANEL;
constexpr int KEY_BYTES = PANELS * KEY_PANEL;
constexpr int LOADERS = 3 * 32;  // threads that bring queries
#ifndef FEEDER_REGISTERS
#define FEEDER_REGISTERS 56
#define WORKER_REGISTERS 224
#endif

struct Arguments {
  const bf16 *q;
  bf16 *out;
  const void *map;
  const unsigned char *kv;
  const int *firstRows, *starts, *counts, *slots;
  int segments, window, headRow;
  u64 slotStride, tokenStride;
  float scale, softcap;
};

/** ROWS rows of one segment's (token, head) pairs that share a key/value head. */
struct Tile {
  int kvHead, row, rows;  // the first pair; how many the segment has
  int start, firstRow, slot;
  int last, end, steps;  // the last position of a row, and behind the segment's; tiles of keys
};

/**
 * Tiles of all segments in one line, the longest first. A tile's level says how many tiles' worth
 * of tokens come before it in its sequence; a level has tiles of some segments, in all heads. Runs
 * of levels with the same segments are passed in one step. Blocks take turns along the line, there
 * and back, so that none gets the longer of every turn. A warp walks it together.
 */
struct Line {
  int before, turn;
  int top, bottom, members;  // levels of the run, and how many segments each has

  __device__ __forceinline__ Line(const Arguments &a) : before(0), turn(0), bottom(0x7fffffff) {
    descend(a);
  }

  /** Levels [from, to) that a segment has tiles of. */
  static __device__ __forceinline__ int2 levelsOf(const Arguments &a, int segment) {
    if (segment >= a.segments) return make_int2(0, 0);
    const int from = a.starts[segment] / TILE_TOKENS;
    return make_int2(from, from + (a.counts[segment] * GROUP + ROWS - 1) / ROWS);
  }

  /** Goes to the next run; `members` is 0 if there is none. */
  __device__ __forceinline__ void descend(const Arguments &a) {
    int highest = -1, lowest = 0;
    members = 0;
    for (int i = threadIdx.x % 32; i < a.segments; i += 32) {
      const int2 levels = levelsOf(a, i);
      if (levels.x >= levels.y || levels.x >= bottom) continue;
      highest = max(highest, min(bottom, levels.y) - 1);
    }
    top = __reduce_max_sync(~0u, highest);
    for (int i = threadIdx.x % 32; i < a.segments; i += 32) {
      const int2 levels = levelsOf(a, i);
      if (levels.x >= levels.y || levels.x > top) continue;
      members += levels.y > top;
      lowest = max(lowest, levels.y > top ? levels.x : levels.y);
    }
    bottom = __reduce_max_sync(~0u, lowest);
    members = __reduce_add_sync(~0u, members);
  }

  __device__ __forceinline__ bool next(const Arguments &a, Tile &tile) {
    const int place = turn % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    const int unit = turn++ * gridDim.x + place;
    for (; members > 0; descend(a)) {
      const int width = members * KV_HEADS, at = unit - before;
      if (at < (top - bottom + 1) * width) {
        const int level = top - at / width, rank = at % width / KV_HEADS;
        fill(a, tile, level, memberOf(a, level, rank), at % width % KV_HEADS);
        return true;
      }
      before += (top - bottom + 1) * width;
    }
    return false;
  }

  /** The segment of a level that has `rank` others of it before it. */
  __device__ __forceinline__ int memberOf(const Arguments &a, int level, int rank) const {
    for (int base = 0;; base += 32) {
      const int2 levels = levelsOf(a, base + threadIdx.x % 32);
      u32 there = __ballot_sync(~0u, level >= levels.x && level < levels.y);
      const int count = __popc(there);
      for (int i = 0; i < min(rank, count); i++) there &= there - 1;
      if (rank < count) return base + __ffs(there) - 1;
      rank -= count;
    }
  }

  static __device__ __forceinline__ void fill(const Arguments &a, Tile &tile, int level,
                                              int segment, int kvHead) {
    tile.kvHead = kvHead;
    tile.start = a.starts[segment];
    tile.row = (level - tile.start / TILE_TOKENS) * ROWS;
    tile.rows = a.counts[segment] * GROUP;
    tile.firstRow = a.firstRows[segment];
    tile.slot = a.slots[segment];
    tile.last = tile.start + (min(tile.row + ROWS, tile.rows) - 1) / GROUP;
    const int from = max(0, tile.start + tile.row / GROUP + 1 - a.window);
    tile.end = tile.start + a.counts[segment];
    tile.steps = tile.last / KEYS - from / KEYS + 1;
  }
};

/** Where a pair's query lies, in elements of q and of out. */
__device__ __forceinline__ u64 elementOf(const Tile &tile, int pair) {
  const u64 row = tile.firstRow + pair / GROUP;
  return (row * KV_HEADS * GROUP + tile.kvHead * GROUP + pair % GROUP) * HEAD_DIM;
}

/** Goes round a ring of stages with a full and an empty barrier each. */
template <int COUNT> struct Ring {
  u32 data, full, empty, bytes;
  int stage;
  u32 parity;

  __device__ __forceinline__ Ring(u32 data, u32 barriers, u32 bytes)
      : data(data), full(barriers), empty(barriers + COUNT * 8), bytes(bytes), stage(0),
        parity(0) {}

  __device__ __forceinline__ u32 at() const { return data + stage * bytes; }
  __device__ __forceinline__ u32 filled() const { return full + stage * 8; }
  __device__ __forceinline__ void awaitFull() const { barrierWait(full + stage * 8, parity); }
  __device__ __forceinline__ void awaitEmpty() const { barrierWait(empty + stage * 8, parity ^ 1); }
  __device__ __forceinline__ void release() const {
    if (threadIdx.x % 32 == 0) barrierArrive(empty + stage * 8);
  }
  __device__ __forceinline__ void advance() {
    if (++stage == COUNT) stage = 0, parity ^= 1;
  }
};

using QueryRing = Ring<QUERY_STAGES>;
using KeyRing = Ring<STAGES>;

/** A tile of one head's keys or values, of all tokens that there are; the last fills the rest. */
__device__ __forceinline__ void loadTokens(const Arguments &a, KeyRing &ring, const Tile &tile,
                                           int row, int step) {
  const int token = (tile.last / KEYS - step) * KEYS, lane = threadIdx.x % 32;
  ring.awaitEmpty();
  if (token + KEYS <= tile.end) {
    if (lane == 0) {
      barrierExpect(ring.filled(), KEY_BYTES);
#pragma unroll
      for (int p = 0; p < PANELS; p++)
        loadBox(ring.at() + p * KEY_PANEL, a.map, p * 64, row, token, tile.slot, ring.filled());
    }
  } else {
    constexpr int CHUNKS = HEAD_DIM / 8;
    const unsigned char *head = a.kv + tile.slot * a.slotStride + (u64)row * (HEAD_DIM * 2);
    for (int i = lane; i < KEYS * CHUNKS; i += 32) {
      const int t = i / CHUNKS, chunk = i % CHUNKS;
      const u64 from = min(token + t, tile.end - 1) * a.tokenStride + chunk * 16;
      copy16(ring.at() + chunk / 8 * KEY_PANEL + t * 128 + ((chunk ^ t) & 7) * 16, head + from);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    publishShared();
    __syncwarp();
    if (lane == 0) barrierArrive(ring.filled());
  }
  ring.advance();
}

/** A warp brings keys and, a tile behind them, values. */
__device__ __forceinline__ void feedTokens(const Arguments &a, KeyRing keys, KeyRing values) {
  Line line(a);
  Tile tile;
  while (line.next(a, tile)) {
    const int row = a.headRow + tile.kvHead;
    for (int step = 0; step < tile.steps; step++) {
      loadTokens(a, keys, tile, row, step);
      if (step > 0) loadTokens(a, values, tile, row + KV_HEADS, step - 1);
    }
    loadTokens(a, values, tile, row + KV_HEADS, tile.steps - 1);
  }
}

__device__ __forceinline__ void feedQueries(const Arguments &a, QueryRing ring, int thread) {
  constexpr int CHUNKS = HEAD_DIM / 8;
  Line line(a);
  Tile tile;
  while (line.next(a, tile)) {
    ring.awaitEmpty();
    for (int i = thread; i < ROWS * CHUNKS; i += LOADERS) {
      const int r = i / CHUNKS, chunk = i % CHUNKS;
      const bf16 *from = a.q + elementOf(tile, min(tile.row + r, tile.rows - 1)) + chunk * 8;
      const u32 to = ring.at() + chunk / 8 * QUERY_PANEL + r * 128 + ((chunk ^ r) & 7) * 16;
      copy16(to, from);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    publishShared();
    barrierArrive(ring.filled());
    ring.advance();
  }
}

/** A worker's turn at the tensor cores, and passing it on. */
__device__ __forceinline__ void turnAwait(int worker) {
  asm volatile("bar.sync %0, 256;" ::"r"(1 + worker) : "memory");
}
__device__ __forceinline__ void turnPass(int worker) {
  asm volatile("bar.arrive %0, 256;" ::"r"(1 + (worker + 1) % WORKERS) : "memory");
}

/** What a thread knows of its two rows, 8 apart. */
struct Rows {
  int position[2];
  float top[2], total[2];
};

/** Scores become weights relative to the new maximum; `decay` is what older sums shrink by. */
__device__ __forceinline__ void softmax(const Arguments &a, float (&s)[KEYS / 2], Rows &rows,
                                        float (&decay)[2], int firstToken, bool edge) {
  const int lane = threadIdx.x % 32;
#ifdef SOFTCAP
  for (int i = 0; i < KEYS / 2; i++) s[i] = softCap(s[i] * (a.scale * LOG2E), a.softcap);
  const float scale = 1;
#else
  const float scale = a.scale * LOG2E;
#endif
  if (edge) {
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
      const int token = firstToken + i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int position = rows.position[i / 2 % 2];
      if (token > position || token <= position - a.window) s[i] = NONE;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float top = rows.top[h];
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
      top = fmaxf(top, fmaxf(s[n * 4 + h * 2], s[n * 4 + h * 2 + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float zero = top == NONE ? 0 : top * scale;
    decay[h] = exp2(rows.top[h] * scale - zero);
    rows.top[h] = top;
    float total = 0;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
      for (int i = n * 4 + h * 2; i < n * 4 + h * 2 + 2; i++) {
        s[i] = exp2(s[i] * scale - zero);
        total += s[i];
      }
    }
    rows.total[h] = rows.total[h] * decay[h] + total;
  }
}

/**
 * Keeps the assembler from doing the whole softmax after the wait that follows: the sum of weights,
 * which is never negative, decides whether shared memory is written.
 */
__device__ __forceinline__ void hold(float total, u32 anywhere) {
  asm volatile("{ .reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p st.shared.f32 [%1], %0; }" ::
               "f"(total), "r"(anywhere) : "memory");
}

/** The weights as the left side of the next product. */
__device__ __forceinline__ void packWeights(const float (&s)[KEYS / 2], u32 (&p)[KEYS / 16][4]) {
#pragma unroll
  for (int k = 0; k < KEYS / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) p[k][i] = pack(s[k * 8 + i * 2], s[k * 8 + i * 2 + 1]);
}

__device__ __forceinline__ void scores(float (&s)[KEYS / 2], u32 queries, u32 keys) {
  productsBegin();
#pragma unroll
  for (int k = 0; k < HEAD_DIM / 16; k++)
    productShared(s, descriptor(queries + k / 4 * QUERY_PANEL + k % 4 * 32, 16),
                  descriptor(keys + k / 4 * KEY_PANEL + k % 4 * 32, 16), k > 0);
  productsCommit();
}

__device__ __forceinline__ void addValues(float (&o)[HEAD_DIM / 2], const u32 (&p)[KEYS / 16][4],
                                          u32 values) {
  productsBegin();
#pragma unroll
  for (int k = 0; k < KEYS / 16; k++)
    productRegisters(o, p[k], descriptor(values + k * 2048, KEY_PANEL));
  productsCommit();
}

__device__ __forceinline__ void writeOut(const Arguments &a, const Tile &tile, Rows &rows,
                                         const float (&o)[HEAD_DIM / 2], int firstPair) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float total = rows.total[h];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const int pair = firstPair + h * 8;
    const float by = 1 / total;
    uint4 *const out = (uint4 *)(a.out + elementOf(tile, min(pair, tile.rows - 1)));
    // Of four pieces of 16 bytes, each of the four threads of a row has a word: swap until each
    // has a piece.
    const bool odd = lane % 2, high = lane / 2 % 2;
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n += 4) {
      u32 w[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        w[i] = pack(o[(n + i) * 4 + h * 2] * by, o[(n + i) * 4 + h * 2 + 1] * by);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const u32 got = __shfl_xor_sync(~0u, odd ? w[i] : w[i + 1], 1);
        (odd ? w[i] : w[i + 1]) = got;
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u32 got = __shfl_xor_sync(~0u, high ? w[i] : w[i + 2], 2);
        (high ? w[i] : w[i + 2]) = got;
      }
      if (pair < tile.rows) out[n + lane % 4] = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

__device__ __forceinline__ void work(const Arguments &a, QueryRing queries, KeyRing keys,
                                     KeyRing values, int worker) {
  const int row = worker * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  Line line(a);
  Tile tile;
  if (worker == WORKERS - 1) turnPass(worker);
  while (line.next(a, tile)) {
    const int first = tile.start + tile.row / GROUP;
    const auto edge = [&](int token) {
      return token + KEYS - 1 > first || token <= tile.last - a.window;
    };
    Rows rows;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      rows.position[h] = tile.start + (tile.row + row + h * 8) / GROUP;
      rows.top[h] = NONE;
      rows.total[h] = 0;
    }
    float o[HEAD_DIM / 2], s[KEYS / 2], decay[2];
    u32 p[KEYS / 16][4];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) o[i] = 0;
    queries.awaitFull();
    const u32 mine = queries.at() + worker * 64 * 128;
    keys.awaitFull();
    scores(s, mine, keys.at());
    productsWait<0>();
    settle(s);
    keys.release();
    keys.advance();
    int token = tile.last / KEYS * KEYS;
    softmax(a, s, rows, decay, token, true);
    packWeights(s, p);
    for (int step = 1; step < tile.steps; step++) {
      token -= KEYS;
      keys.awaitFull();
      turnAwait(worker);
      scores(s, mine, keys.at());
      values.awaitFull();
      addValues(o, p, values.at());
      turnPass(worker);
      productsWait<1>();
      settle(s);
      keys.release();
      keys.advance();
      softmax(a, s, rows, decay, token, edge(token));
      hold(rows.total[0] + rows.total[1], keys.full);
      productsWait<0>();
      settle(o);
      values.release();
      values.advance();
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 2; i++) o[i] *= decay[i / 2 % 2];
      packWeights(s, p);
    }
    queries.release();
    queries.advance();
    values.awaitFull();
    addValues(o, p, values.at());
    productsWait<0>();
    settle(o);
    values.release();
    values.advance();
    writeOut(a, tile, rows, o, tile.row + row);
  }
  // The turn that is still on its way to this worker must not be left behind.
  if (worker == 0) turnAwait(worker);
}

extern __shared__ unsigned char shared[];

extern "C" __global__ void __launch_bounds__(128 + 128 * WORKERS, 1)
    attentionPrefill(const bf16 *q, bf16 *out, const __grid_constant__ TensorMap map,
                     const unsigned char *kv, const int *firstRows, const int *starts,
                     const int *counts, const int *slots, int segments, int window, int headRow,
                     u64 slotStride, u64 tokenStride, float scale, float softcap) {
  const Arguments a = {q, out, &map, kv, firstRows, starts, counts, slots, segments, window,
                       headRow, slotStride, tokenStride, scale, softcap};
  const u32 base = (address(shared) + 1023) / 1024 * 1024;
  const u32 barriers = base + QUERY_STAGES * QUERY_BYTES + 2 * STAGES * KEY_BYTES;
  const QueryRing queries(base, barriers, QUERY_BYTES);
  const KeyRing keys(base + QUERY_STAGES * QUERY_BYTES, barriers + QUERY_STAGES * 16, KEY_BYTES);
  const KeyRing values(keys.data + STAGES * KEY_BYTES, keys.full + STAGES * 16, KEY_BYTES);
  if (threadIdx.x == 0) {
    for (int s = 0; s < QUERY_STAGES; s++) {
      barrierInit(queries.full + s * 8, LOADERS);
      barrierInit(queries.empty + s * 8, WORKERS * 4);
    }
    for (int s = 0; s < STAGES; s++) {
      barrierInit(keys.full + s * 8, 1);
      barrierInit(values.full + s * 8, 1);
      barrierInit(keys.empty + s * 8, WORKERS * 4);
      barrierInit(values.empty + s * 8, WORKERS * 4);
    }
  }
  barriersReady();
  awaitPredecessor();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEEDER_REGISTERS));
    if (threadIdx.x < 32) feedTokens(a, keys, values);
    else feedQueries(a, queries, threadIdx.x - 32);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WORKER_REGISTERS));
    work(a, queries, keys, values, threadIdx.x / 128 - 1);
  }
}
