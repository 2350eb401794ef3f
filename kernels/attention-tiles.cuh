// Owns what attention of one query token a row is made of: the line of all rows' and heads' tiles
// and how workers share it, the products of a warp's 16 tokens of a tile, and how parts of a
// result are merged. attention-decode.cu says how it fits together.
//
// Before: -D HEAD_DIM GROUP KV_HEADS WARPS [SOFTCAP]
#pragma once
#include "evens.cuh"
#include "tensor-core.cuh"

constexpr int COLUMNS = (GROUP + 7) / 8;  // tiles of 8 query heads
constexpr int STEPS = HEAD_DIM / 16;      // tensor-core steps over a head
constexpr int SHARE = (STEPS + WARPS - 1) / WARPS;
constexpr int TILE = 16 * WARPS;          // tokens
// 64 dimensions of a tile's tokens, 128 bytes each, 16-byte pieces swizzled.
constexpr int PANEL = TILE * 128;
constexpr int PANELS = (HEAD_DIM + 63) / 64;
// float4 of a warp's sums: all steps in shared memory, its share in scratch; then maxima, totals.
constexpr int WHOLE = COLUMNS * (STEPS + 1) * 32;
constexpr int PART = COLUMNS * (SHARE + 1) * 32;

static_assert(HEAD_DIM % 16 == 0, "tensor cores take steps of 16 dimensions");

__device__ __forceinline__ u32 transpose(u32 x) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
  return r;
}

struct Arguments {
  const bf16 *q;
  bf16 *out;
  const void *map;
  const unsigned char *kv;
  const int *slots, *lengths;
  int rows, window, headRow;
  u64 slotStride, tokenStride;
  float scale, softcap;
  float4 *partial;
  u32 *arrivals;
};

/** A stretch of the tiles of one row and head; `all` are all of these. */
struct Piece {
  int row, kvHead, tile, tiles, all, first, length;
  u32 start;  // where on the line the tiles of this row and head begin
};

/** Walks the pieces of a worker's stretch of the line; every warp walks it by itself. */
struct Walk {
  const int *lengths;
  int window, row, kvHead;
  u32 at, end, itemStart;
  u32 blocks, each, longer;  // of `blocks` the first `longer` take each + 1 tiles, the others each
  u32 worker;

  __device__ __forceinline__ int tilesOf(int length) const {
    return max(1, (min(length, window) + TILE - 1) / TILE);
  }

  __device__ __forceinline__ u32 startOf(u32 block) const {
    return block * each + min(block, longer);
  }

  /** The block that has the tile at this place of the line. */
  __device__ __forceinline__ u32 blockOf(u32 place) const {
    const u32 first = longer * (each + 1);
    return place < first ? place / (each + 1) : longer + (place - first) / each;
  }

  __device__ __forceinline__ Walk(const Arguments &a, u32 worker, u32 workers)
      : lengths(a.lengths), window(a.window), worker(worker) {
    const int lane = threadIdx.x % 32, rows = (a.rows + 31) / 32;
    const int from = min(a.rows, lane * rows), to = min(a.rows, from + rows);
    int own = 0;
    for (int r = from; r < to; r++) {
      asm volatile("prefetch.global.L1 [%0];" ::"l"(a.slots + r));
      own += tilesOf(lengths[r]);
    }
    int sum = own;
    for (int d = 1; d < 32; d *= 2) {
      const int left = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += left;
    }
    const u32 total = (u32)__shfl_sync(~0u, sum, 31) * KV_HEADS;
    blocks = min(workers, total);
    each = total / max(1u, blocks);
    longer = total - each * blocks;
    at = startOf(min(worker, blocks));
    end = startOf(min(worker + 1, blocks));
    const u32 before = __ballot_sync(~0u, (u32)sum * KV_HEADS <= at);
    const int owner = min(31, __popc(before));
    row = owner * rows;
    itemStart = (u32)__shfl_sync(~0u, sum - own, owner) * KV_HEADS;
    kvHead = 0;
    if (at >= end) return;
    int tiles;
    for (;; row++) {
      tiles = tilesOf(lengths[row]);
      if (at < itemStart + (u32)tiles * KV_HEADS) break;
      itemStart += (u32)tiles * KV_HEADS;
    }
    kvHead = (at - itemStart) / tiles;
    itemStart += (u32)kvHead * tiles;
  }

  __device__ __forceinline__ bool next(Piece &p) {
    if (at >= end) return false;
    p.row = row;
    p.kvHead = kvHead;
    p.length = lengths[row];
    p.first = max(0, p.length - window);
    p.all = tilesOf(p.length);
    p.tile = at - itemStart;
    p.tiles = min(end - at, (u32)(p.all - p.tile));
    p.start = itemStart;
    at += p.tiles;
    if (p.tile + p.tiles == p.all) {
      itemStart += p.all;
      if (++kvHead == KV_HEADS) kvHead = 0, row++;
    }
    return true;
  }
};

/**
 * Part of a result in a warp: by column (query head) the maximum, the total of weights, and
 * weighted sums of values for N steps of 16 dimensions, in fragments of the product O'.
 */
template <int N> struct Sums {
  float m[COLUMNS][2], l[COLUMNS][2], o[COLUMNS][N][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      m[c][0] = m[c][1] = NONE;
      l[c][0] = l[c][1] = 0;
#pragma unroll
      for (int s = 0; s < N; s++) o[c][s][0] = o[c][s][1] = o[c][s][2] = o[c][s][3] = 0;
    }
  }

  /** Each lane has summed its own tokens: now all have the totals. */
  __device__ __forceinline__ void total() {
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
      for (int i = 0; i < 2; i++)
        for (int d = 4; d < 32; d *= 2) l[c][i] += __shfl_xor_sync(~0u, l[c][i], d);
  }

  __device__ __forceinline__ void store(float4 *to) const {
    to += threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
      for (int s = 0; s < N; s++, to += 32)
        *to = make_float4(o[c][s][0], o[c][s][1], o[c][s][2], o[c][s][3]);
      *to = make_float4(m[c][0], m[c][1], l[c][0], l[c][1]);
      to += 32;
    }
  }

  /**
   * Merges `count` pieces of M steps each, from step `first` on; a batch at a time, all of whose
   * reads are under way before the first is used.
   */
  template <int M, typename Place>
  __device__ __forceinline__ void gather(int count, Place place, int first) {
    constexpr int BATCH = N >= 8 ? 2 : 16 / N;
    clear();
    for (int i = 0; i < count; i += BATCH) {
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) {
        float4 tail[BATCH], x[BATCH][N];
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
          const float4 *from = place(min(i + b, count - 1)) + c * (M + 1) * 32 + threadIdx.x % 32;
          tail[b] = from[M * 32];
#pragma unroll
          for (int s = 0; s < N; s++) x[b][s] = from[min(first + s, M - 1) * 32];
        }
        float top[2] = {m[c][0], m[c][1]};
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
          if (i + b >= count) tail[b].x = tail[b].y = NONE;
          top[0] = fmaxf(top[0], tail[b].x), top[1] = fmaxf(top[1], tail[b].y);
        }
        const float zero[2] = {top[0] == NONE ? 0 : top[0], top[1] == NONE ? 0 : top[1]};
        scale(c, exp2(m[c][0] - zero[0]), exp2(m[c][1] - zero[1]));
        m[c][0] = top[0], m[c][1] = top[1];
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
          const float take[2] = {exp2(tail[b].x - zero[0]), exp2(tail[b].y - zero[1])};
          l[c][0] += tail[b].z * take[0], l[c][1] += tail[b].w * take[1];
#pragma unroll
          for (int s = 0; s < N; s++) {
            o[c][s][0] += x[b][s].x * take[0], o[c][s][1] += x[b][s].y * take[1];
            o[c][s][2] += x[b][s].z * take[0], o[c][s][3] += x[b][s].w * take[1];
          }
        }
      }
    }
  }

  /** What was summed relative to an older maximum shrinks. */
  __device__ __forceinline__ void scale(int c, float even, float odd) {
    l[c][0] *= even, l[c][1] *= odd;
#pragma unroll
    for (int s = 0; s < N; s++)
      o[c][s][0] *= even, o[c][s][1] *= odd, o[c][s][2] *= even, o[c][s][3] *= odd;
  }

  /** Another part of the same result, of which each has seen a token. */
  __device__ __forceinline__ void add(const Sums &other) {
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      float take[2], keep[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float top = fmaxf(m[c][i], other.m[c][i]);
        take[i] = exp2(other.m[c][i] - top), keep[i] = exp2(m[c][i] - top);
        m[c][i] = top;
      }
      scale(c, keep[0], keep[1]);
#pragma unroll
      for (int i = 0; i < 2; i++) l[c][i] += other.l[c][i] * take[i];
#pragma unroll
      for (int s = 0; s < N; s++) {
#pragma unroll
        for (int i = 0; i < 4; i++) o[c][s][i] += other.o[c][s][i] * take[i % 2];
      }
    }
  }

  /**
   * `to`: the group's first head; from 64 of its elements to the next 64 are `stride`; EVENS: for a
   * product that wants elements as evens.cuh says.
   */
  template <bool EVENS = false>
  __device__ __forceinline__ void output(bf16 *to, int first, int stride = 64) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      const bool some[2] = {l[c][0] > 0, l[c][1] > 0};
      constexpr float FACTOR = EVENS ? EVENS_FACTOR : 1;
      const float by[2] = {FACTOR / l[c][0], FACTOR / l[c][1]};
#pragma unroll
      for (int s = 0; s < N; s++) {
        const float x0 = some[0] ? o[c][s][0] * by[0] : 0, x1 = some[1] ? o[c][s][1] * by[1] : 0;
        const float x2 = some[0] ? o[c][s][2] * by[0] : 0, x3 = some[1] ? o[c][s][3] * by[1] : 0;
        u32 low = transpose(pack(x0, x1)), high = transpose(pack(x2, x3));
        if (EVENS) low = evensApart(low), high = evensApart(high);
        const int head = c * 8 + lane / 4;
        if (head >= GROUP || first + s >= STEPS) continue;
        const int place = head * HEAD_DIM + (first + s) * 16;
        u32 *const at = (u32 *)(to + place / 64 * stride + place % 64);
        at[EVENS ? evensPlace() : lane % 4] = low;
        at[EVENS ? evensPlace() + 2 : lane % 4 + 4] = high;
      }
    }
  }
};

/**
 * The token that a tile begins with. The oldest tile begins with the sequence, and ends where the
 * next one begins: what it would lack is not in memory. Below 0 only if the sequence is shorter.
 */
__device__ __forceinline__ int firstToken(const Piece &p, int tile) {
  const int token = p.length - (tile + 1) * TILE;
  return p.length >= TILE ? max(0, token) : token;
}

/** Where ldmatrix finds step k of a token's dimensions; `half` is the lane's 16 bytes of 32. */
__device__ __forceinline__ u32 stepAt(const u32 (&panels)[PANELS], int token, int half, int k) {
  return panels[k / 4] + token * 128 + ((k % 4 * 32) ^ ((half ^ (token & 7)) * 16));
}

/** Adds 16 tokens from `token` of a tile on to the state; of all only begin … end - 1 are seen. */
__device__ __forceinline__ void attend(const Arguments &a, Sums<STEPS> &state,
                                       const u32 (&keys)[PANELS], const u32 (&values)[PANELS],
                                       int token, const u32 (&q)[COLUMNS][STEPS][2], int begin,
                                       int end) {
  const int lane = threadIdx.x % 32;
  float s[COLUMNS][2][4] = {};
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    u32 matrix[4];
    loadMatrices(matrix, stepAt(keys, token + lane % 16, lane / 16, k));
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) multiply(s[c][k % 2], matrix, q[c][k][0], q[c][k][1]);
  }
  u32 weights[COLUMNS][2];
  const int low = token + lane / 4, high = low + 8;
  const bool hidden[2] = {low < begin || low >= end, high < begin || high >= end};
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) {
    float x[4], decay[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      x[i] = (s[c][0][i] + s[c][1][i]) * (a.scale * LOG2E);
#ifdef SOFTCAP
      x[i] = softCap(x[i], a.softcap);
#endif
      if (hidden[i / 2]) x[i] = NONE;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float top = fmaxf(x[i], x[i + 2]);
      for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
      top = fmaxf(top, state.m[c][i]);
      const float zero = top == NONE ? 0 : top;
      decay[i] = exp2(state.m[c][i] - zero);
      state.m[c][i] = top;
      x[i] = exp2(x[i] - zero);
      x[i + 2] = exp2(x[i + 2] - zero);
    }
    state.scale(c, decay[0], decay[1]);
    state.l[c][0] += x[0] + x[2], state.l[c][1] += x[1] + x[3];
    weights[c][0] = transpose(pack(x[0], x[1]));
    weights[c][1] = transpose(pack(x[2], x[3]));
  }
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    u32 matrix[4];
    const int row = token + lane % 8 + lane / 16 * 8;
    loadTransposed(matrix, stepAt(values, row, lane / 8 % 2, k));
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) multiply(state.o[c][k], matrix, weights[c][0], weights[c][1]);
  }
}

/** Whether all `count` parts of a warp's share of a result have been stored. */
__device__ __forceinline__ bool arriveLast(u32 *arrivals, int count) {
  __threadfence();
  __syncwarp();
  u32 before = 0;
  if (threadIdx.x % 32 == 0) {
    before = atomicAdd(arrivals, 1);
    if (before == count - 1) *arrivals = 0;
  }
  before = __shfl_sync(~0u, before, 0);
  __threadfence();
  return before == count - 1;
}

