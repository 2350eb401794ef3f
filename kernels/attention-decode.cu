// Owns attention of one query token a row over its sequence's keys and values in strided memory.
//
// q, out  [rows, heads, HEAD_DIM] bf16; the GROUP query heads of a key/value head are neighbours.
// kv      address(slot, token) = kv + slot·slotStride + token·tokenStride, in bytes; at keyOffset
//         from there lie [KV_HEADS, HEAD_DIM] bf16 keys, directly behind them the values.
// slots, lengths  [rows] int32: row r sees tokens max(0, lengths[r] - window) … lengths[r] - 1 of
//         slot slots[r]; nothing beyond them is read. A row of length 0 comes out as zeros.
// partial float32 scratch, arrivals [rows · KV_HEADS] uint32 that are zero before and after.
//
// Work is cut evenly whatever the lengths (stream-K, Osama et al. 2023): all tiles of all rows form
// one line, every block takes an equal stretch of it, and the last block to finish a row's part
// merges the parts (flash decoding, Dao et al. 2023). A tile holds whole rows of HEAD_BLOCK heads,
// so that memory is read in long runs. Tokens are the long side of the tensor-core products
// (S' = K·Q', O' = V'·P'), which pads the group to 8 or 16 columns.
// Sums and softmax are float32: ‖error‖ ≤ 1e-2 of bf16 results, oracle test/cuda/attention.ts.
//
// -D HEAD_DIM GROUP KV_HEADS HEAD_BLOCK TOKEN_WARPS STAGES [SOFTCAP]

#include "tensor-core.cuh"

constexpr int HEAD_BLOCKS = KV_HEADS / HEAD_BLOCK;
constexpr int COLUMNS = (GROUP + 7) / 8;       // tiles of 8 query heads
constexpr int STEPS = HEAD_DIM / 16;           // tensor-core steps over a head
constexpr int TILE = 16 * TOKEN_WARPS;         // tokens
constexpr int CONSUMERS = HEAD_BLOCK * TOKEN_WARPS;
#if defined(BOXES) && __CUDA_ARCH__ >= 900
// A stage: [keys, values][head][panel of 64 dimensions][token] of 128 bytes, swizzled.
constexpr int PANEL = TILE * 128;
constexpr int HEAD_BYTES = (HEAD_DIM + 63) / 64 * PANEL;
constexpr int VALUES = HEAD_BLOCK * HEAD_BYTES;
constexpr int STAGE = 2 * VALUES;
#else
// A stage: [token][keys, values][head][dimension] and 16 bytes: ldmatrix then meets every bank once.
constexpr int HEAD_BYTES = HEAD_DIM * 2;
constexpr int VALUES = HEAD_BLOCK * HEAD_BYTES;
constexpr int ROW = 2 * VALUES;
constexpr int PITCH = ROW + 16;
constexpr int STAGE = TILE * PITCH;
#endif
constexpr int STATE = COLUMNS * (STEPS + 1);   // float4 a lane: sums, then maxima and totals
constexpr int SHARE = (STEPS + TOKEN_WARPS - 1) / TOKEN_WARPS;  // steps that a warp merges
constexpr int MERGE = TOKEN_WARPS > 1 ? CONSUMERS * STATE * 32 * 16 : 0;

static_assert(HEAD_DIM % 16 == 0 && KV_HEADS % HEAD_BLOCK == 0, "shapes");

struct __align__(64) TensorMap {
  u64 opaque[16];
};

extern __shared__ __align__(1024) unsigned char shared[];

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

/** A stretch of one row's tiles for one block of heads; `all` are the row's tiles. */
struct Piece {
  int row, block, tile, tiles, all, first, length;
  u64 start;  // where on the line of all tiles the row's part for this block of heads begins
};

/** Walks the pieces of this block's stretch of the line; every warp walks it by itself. */
struct Walk {
  const int *lengths;
  int window;
  u64 at, end, total, itemStart;
  int row, block, blocks;

  __device__ __forceinline__ int tilesOf(int length) const {
    const int seen = min(length, window);
    return max(1, (seen + TILE - 1) / TILE);
  }

  __device__ __forceinline__ Walk(const Arguments &a) : lengths(a.lengths), window(a.window) {
    const int lane = threadIdx.x % 32, each = (a.rows + 31) / 32;
    const int from = min(a.rows, lane * each), to = min(a.rows, from + each);
    int own = 0;
    for (int r = from; r < to; r++) own += tilesOf(lengths[r]);
    int sum = own;
    for (int d = 1; d < 32; d *= 2) {
      const int left = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += left;
    }
    total = (u64)__shfl_sync(~0u, sum, 31) * HEAD_BLOCKS;
    blocks = (int)min((u64)gridDim.x, total);
    const u64 me = blockIdx.x;
    at = me < blocks ? total * me / blocks : 0;
    end = me < blocks ? total * (me + 1) / blocks : 0;
    const u32 before = __ballot_sync(~0u, (u64)sum * HEAD_BLOCKS <= at);
    const int owner = min(31, __popc(before));
    row = owner * each;
    itemStart = (u64)__shfl_sync(~0u, sum - own, owner) * HEAD_BLOCKS;
    block = 0;
    if (at >= end) return;
    asm volatile("prefetch.global.L1 [%0];" ::"l"(a.slots + row));
    for (;; row++) {
      const u64 whole = (u64)tilesOf(lengths[row]) * HEAD_BLOCKS;
      if (at < itemStart + whole) break;
      itemStart += whole;
    }
    const int tiles = tilesOf(lengths[row]);
    block = (int)((at - itemStart) / tiles);
    itemStart += (u64)block * tiles;
  }

  __device__ __forceinline__ bool next(Piece &p) {
    if (at >= end) return false;
    p.row = row;
    p.block = block;
    p.length = lengths[row];
    p.first = max(0, p.length - window);
    p.all = tilesOf(p.length);
    p.tile = (int)(at - itemStart);
    p.tiles = (int)min(end - at, (u64)(p.all - p.tile));
    p.start = itemStart;
    at += p.tiles;
    if (p.tile + p.tiles == p.all) {
      itemStart += p.all;
      if (++block == HEAD_BLOCKS) block = 0, row++;
    }
    return true;
  }

  /** The block that has the tile at this place of the line. */
  __device__ __forceinline__ int blockOf(u64 place) const {
    return (int)(((place + 1) * blocks - 1) / total);
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

  template <int M> __device__ __forceinline__ void adopt(const Sums<M> &other) {
    if constexpr (M == N) *this = other;
  }

  /** Each lane has summed its own tokens: now all have the totals. */
  __device__ __forceinline__ void total() {
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
      for (int i = 0; i < 2; i++)
        for (int d = 4; d < 32; d *= 2) l[c][i] += __shfl_xor_sync(~0u, l[c][i], d);
  }

  /** Writes the steps, of which the first is `first`, into a whole piece's place. */
  __device__ __forceinline__ void store(float4 *to, int first) const {
    to += threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
      for (int s = 0; s < N; s++)
        if (first + s < STEPS)
          to[(c * (STEPS + 1) + first + s) * 32] =
              make_float4(o[c][s][0], o[c][s][1], o[c][s][2], o[c][s][3]);
      if (first == 0)
        to[(c * (STEPS + 1) + STEPS) * 32] = make_float4(m[c][0], m[c][1], l[c][0], l[c][1]);
    }
  }

  /** Merges `count` pieces, a few at a time so that their reads overlap. */
  template <typename Place> __device__ __forceinline__ void gather(int count, Place place, int first) {
    constexpr int BATCH = 4;
    clear();
    for (int i = 0; i < count; i += BATCH) {
      const float4 *from[BATCH];
      float4 tail[BATCH];
#pragma unroll
      for (int b = 0; b < BATCH; b++) from[b] = place(min(i + b, count - 1)) + threadIdx.x % 32;
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
          tail[b] = from[b][(c * (STEPS + 1) + STEPS) * 32];
          if (i + b >= count) tail[b].x = tail[b].y = NONE;
        }
        float top[2] = {m[c][0], m[c][1]};
#pragma unroll
        for (int b = 0; b < BATCH; b++)
          top[0] = fmaxf(top[0], tail[b].x), top[1] = fmaxf(top[1], tail[b].y);
        const float zero[2] = {top[0] == NONE ? 0 : top[0], top[1] == NONE ? 0 : top[1]};
        const float keep[2] = {exp2(m[c][0] - zero[0]), exp2(m[c][1] - zero[1])};
        m[c][0] = top[0], m[c][1] = top[1];
        l[c][0] *= keep[0], l[c][1] *= keep[1];
#pragma unroll
        for (int s = 0; s < N; s++)
          o[c][s][0] *= keep[0], o[c][s][1] *= keep[1], o[c][s][2] *= keep[0], o[c][s][3] *= keep[1];
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
          const float take[2] = {exp2(tail[b].x - zero[0]), exp2(tail[b].y - zero[1])};
          l[c][0] += tail[b].z * take[0], l[c][1] += tail[b].w * take[1];
#pragma unroll
          for (int s = 0; s < N; s++) {
            const float4 x = from[b][(c * (STEPS + 1) + min(first + s, STEPS - 1)) * 32];
            o[c][s][0] += x.x * take[0], o[c][s][1] += x.y * take[1];
            o[c][s][2] += x.z * take[0], o[c][s][3] += x.w * take[1];
          }
        }
      }
    }
  }

  /** `to`: the group's first head. */
  __device__ __forceinline__ void output(bf16 *to, int first) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      const bool some[2] = {l[c][0] > 0, l[c][1] > 0};
      const float by[2] = {1 / l[c][0], 1 / l[c][1]};
#pragma unroll
      for (int s = 0; s < N; s++) {
        const float x0 = some[0] ? o[c][s][0] * by[0] : 0, x1 = some[1] ? o[c][s][1] * by[1] : 0;
        const float x2 = some[0] ? o[c][s][2] * by[0] : 0, x3 = some[1] ? o[c][s][3] * by[1] : 0;
        const u32 low = transpose(pack(x0, x1)), high = transpose(pack(x2, x3));
        const int head = c * 8 + lane / 4;
        if (head >= GROUP || first + s >= STEPS) continue;
        u32 *const at = (u32 *)(to + head * HEAD_DIM + (first + s) * 16 + lane % 4 * 2);
        at[0] = low;
        at[4] = high;
      }
    }
  }
};

#if __CUDA_ARCH__ >= 900 && defined(BOXES)
/** A box for each head and panel; tokens before the first are outside the tensor: zeros. */
__device__ __forceinline__ void copyTile(const Arguments &a, int slot, int headRow, int token,
                                         const Piece &, u32 to, u32 filled) {
  constexpr int BOXES_EACH = HEAD_BYTES / PANEL, COUNT = 2 * HEAD_BLOCK * BOXES_EACH;
  const int lane = threadIdx.x % 32;
  if (lane == 0) barrierExpect(filled, STAGE);
  __syncwarp();
  for (int i = lane; i < COUNT; i += 32) {
    const int panel = i % BOXES_EACH, head = i / BOXES_EACH % HEAD_BLOCK, value = i >= COUNT / 2;
    loadBox(to + i * PANEL, a.map, panel * 64, headRow + head + value * KV_HEADS, token, slot, filled);
  }
}
#else
/**
 * Whole rows. In place of tokens before the first that is seen, that one is copied again: shared
 * memory never holds what was not written, and nothing else is touched.
 */
__device__ __forceinline__ void copyTile(const Arguments &a, int slot, int headRow, int token,
                                         const Piece &p, u32 to, u32 filled) {
  constexpr int APART = KV_HEADS * HEAD_BYTES;  // keys and values in global memory
  const int lane = threadIdx.x % 32;
  const unsigned char *keys = a.kv + (u64)slot * a.slotStride + (u64)headRow * HEAD_BYTES;
#if __CUDA_ARCH__ >= 900
  if (lane == 0) {
    if (p.length == 0) barrierArrive(filled);
    else barrierExpect(filled, TILE * ROW);
  }
  __syncwarp();
#pragma unroll
  for (int t = lane; t < TILE && p.length > 0; t += 32) {
    const unsigned char *from = keys + (u64)max(token + t, p.first) * a.tokenStride;
    constexpr int RUNS = HEAD_BLOCKS == 1 ? 1 : 2;
#pragma unroll
    for (int run = 0; run < RUNS; run++)
      copyBulk(to + t * PITCH + run * VALUES, from + run * APART, ROW / RUNS, filled);
  }
#else
  constexpr int CHUNKS = ROW / 16;
  for (int i = lane; i < TILE * CHUNKS && p.length > 0; i += 32) {
    const int t = i / CHUNKS, chunk = i % CHUNKS, value = chunk >= CHUNKS / 2;
    const unsigned char *from = keys + (u64)max(token + t, p.first) * a.tokenStride;
    copy16(to + t * PITCH + chunk * 16, from + value * APART + (chunk - value * (CHUNKS / 2)) * 16);
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(filled) : "memory");
#endif
}
#endif

/** Copies the tiles of this block's pieces into the ring, one stage after another. */
__device__ __forceinline__ void produce(const Arguments &a, u32 stages, u32 full, u32 empty) {
  Walk walk(a);
  Piece p;
  int stage = 0;
  u32 parity = 1;
  while (walk.next(p)) {
    const int slot = a.slots[p.row], headRow = a.headRow + p.block * HEAD_BLOCK;
    for (int tile = p.tile; tile < p.tile + p.tiles; tile++) {
      const u32 filled = full + stage * 8, to = stages + stage * STAGE;
      barrierWait(empty + stage * 8, parity);
      const int token = p.length - (tile + 1) * TILE;  // the last tile's may be negative
      copyTile(a, slot, headRow, token, p, to, filled);
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
  }
}

/** Where ldmatrix finds step k of a head's dimensions; `half` is the lane's 16 bytes of 32. */
__device__ __forceinline__ u32 stepAt(u32 head, int token, int half, int k) {
#if defined(BOXES) && __CUDA_ARCH__ >= 900
  return head + k / 4 * PANEL + token * 128 + ((k % 4 * 32) ^ ((half ^ (token & 7)) * 16));
#else
  return head + token * PITCH + half * 16 + k * 32;
#endif
}

/** Adds 16 tokens from `token` of a stage on to the state; those below `begin` are hidden. */
__device__ __forceinline__ void attend(const Arguments &a, Sums<STEPS> &state, u32 keys, int token,
                                       const u32 (&q)[COLUMNS][STEPS][2], int begin) {
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
  const bool hidden[2] = {token + lane / 4 < begin, token + lane / 4 + 8 < begin};
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
      state.l[c][i] = state.l[c][i] * decay[i] + x[i] + x[i + 2];
    }
    weights[c][0] = transpose(pack(x[0], x[1]));
    weights[c][1] = transpose(pack(x[2], x[3]));
#pragma unroll
    for (int k = 0; k < STEPS; k++)
      for (int i = 0; i < 4; i++) state.o[c][k][i] *= decay[i % 2];
  }
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    u32 matrix[4];
    const int row = token + lane % 8 + lane / 16 * 8;
    loadTransposed(matrix, stepAt(keys + VALUES, row, lane / 8 % 2, k));
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) multiply(state.o[c][k], matrix, weights[c][0], weights[c][1]);
  }
}

/** The warps of one head wait for each other. */
__device__ __forceinline__ void team(int head) {
  if (TOKEN_WARPS == 1) __syncwarp();
  else asm volatile("bar.sync %0, %1;" ::"r"(1 + head), "n"(TOKEN_WARPS * 32) : "memory");
}

__device__ __forceinline__ void consume(const Arguments &a, u32 stages, u32 full, u32 empty,
                                        float4 *area, volatile u32 *verdict) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int head = warp / TOKEN_WARPS, member = warp % TOKEN_WARPS;
  const int first = member * SHARE;
  Walk walk(a);
  Piece p;
  int stage = 0;
  u32 parity = 0;
  while (walk.next(p)) {
    const int kvHead = p.block * HEAD_BLOCK + head;
    const u64 group = ((u64)p.row * KV_HEADS + kvHead) * GROUP * HEAD_DIM;
    u32 q[COLUMNS][STEPS][2];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      const int at = c * 8 + lane / 4;
      const u32 *from = (const u32 *)(a.q + group + at * HEAD_DIM) + lane % 4;
#pragma unroll
      for (int k = 0; k < STEPS; k++)
        for (int i = 0; i < 2; i++) q[c][k][i] = at < GROUP ? from[k * 8 + i * 4] : 0;
    }
    Sums<STEPS> state;
    state.clear();
    for (int tile = p.tile; tile < p.tile + p.tiles; tile++) {
      barrierWait(full + stage * 8, parity);
      const int begin = p.first - (p.length - (tile + 1) * TILE);
      attend(a, state, stages + stage * STAGE + head * HEAD_BYTES, member * 16, q, begin);
      __syncwarp();
      if (lane == 0) barrierArrive(empty + stage * 8);
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    state.total();
    // From here on each of the head's warps has all its tokens, for a share of the dimensions.
    Sums<SHARE> sums;
    if constexpr (TOKEN_WARPS == 1) {
      sums.adopt(state);
    } else {
      const auto ofWarp = [&](int w) { return area + (head * TOKEN_WARPS + w) * STATE * 32; };
      state.store(ofWarp(member), 0);
      team(head);
      sums.gather(TOKEN_WARPS, ofWarp, first);
      team(head);
    }
    if (p.tiles < p.all) {
      const int from = walk.blockOf(p.start), to = walk.blockOf(p.start + p.all - 1);
      const auto part = [&](int i) {
        const int second = i == 0;  // the item began at the end of that block's stretch
        return a.partial + (((u64)(from + i) * 2 + second) * HEAD_BLOCK + head) * STATE * 32;
      };
      sums.store(part(blockIdx.x - from), first);
      __threadfence();
      team(head);
      if (member == 0 && lane == 0) {
        u32 *const arrivals = a.arrivals + (u64)p.row * KV_HEADS + kvHead;
        const bool last = atomicAdd(arrivals, 1) == to - from;
        if (last) *arrivals = 0;
        verdict[head] = last;
      }
      team(head);
      if (!verdict[head]) continue;
      __threadfence();
      sums.gather(to - from + 1, part, first);
    }
    sums.output(a.out + group, first);
  }
}

extern "C" __global__ void __launch_bounds__((CONSUMERS + 1) * 32)
    attentionDecode(const bf16 *q, bf16 *out, const __grid_constant__ TensorMap map,
                    const unsigned char *kv, const int *slots, const int *lengths, int rows,
                    int window, int headRow, u64 slotStride, u64 tokenStride, float scale,
                    float softcap, float4 *partial, u32 *arrivals) {
  const Arguments a = {q, out, &map, kv, slots, lengths, rows, window, headRow, slotStride,
                       tokenStride, scale, softcap, partial, arrivals};
  unsigned char *const ring = shared;
  float4 *const area = (float4 *)(ring + STAGES * STAGE);
  unsigned char *const tail = (unsigned char *)area + MERGE;
  const u32 full = address(tail), empty = full + STAGES * 8;
  u32 *const verdict = (u32 *)(tail + STAGES * 16);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrierInit(full + s * 8, __CUDA_ARCH__ >= 900 ? 1 : 32);
      barrierInit(empty + s * 8, CONSUMERS);
    }
  }
  barriersReady();
  awaitPredecessor();
  if (threadIdx.x / 32 == CONSUMERS) produce(a, address(ring), full, empty);
  else consume(a, address(ring), full, empty, area, verdict);
}
