// Owns attention of one query token a row over its sequence's keys and values in strided memory.
//
// q, out  [rows, heads, HEAD_DIM] bf16; the GROUP query heads of a key/value head are neighbours.
// kv      address(slot, token) = kv + slot·slotStride + token·tokenStride, in bytes; row headRow of
//         HEAD_DIM bf16 is there the layer's first key; KV_HEADS keys come before as many values.
// map     the same memory as a tensor map (9.0 and later) of [slots, tokens, layers · 2 · KV_HEADS,
//         HEAD_DIM] bf16 with boxes of [1, TILE, 1, 64], swizzled by 128 bytes.
// slots, lengths  [rows] int32: row r sees tokens max(0, lengths[r] - window) … lengths[r] - 1 of
//         slot slots[r], and none beyond is read. A row of length 0 comes out as zeros.
// partial float32 scratch, arrivals [rows · KV_HEADS · WARPS] uint32, zero before and after.
//
// Work is cut evenly whatever the lengths (stream-K, Osama et al. 2023): all tiles of all rows and
// heads form one line, every block takes an equal stretch of it, and the last block to finish a
// part of a row merges the parts (flash decoding, Dao et al. 2023). Tiles are counted backwards
// from a row's last token, so that none reaches beyond it into memory that may not be mapped.
// Older tokens than that are asked for before the kernel that appends it has ended (programmatic
// dependent launch): it has to let this one start only when all before it are complete.
// Tokens are the long side of the tensor-core products (S' = K·Q', O' = V'·P'), which pads the
// group to 8 or 16 columns. Each warp has 16 tokens of a tile; in merging, a share of dimensions.
// Sums and softmax are float32: ‖error‖ ≤ 1e-2 of bf16 results, oracle test/cuda/attention.ts.
//
// -D HEAD_DIM GROUP KV_HEADS WARPS STAGES [SOFTCAP]

#include "tensor-core.cuh"

constexpr int COLUMNS = (GROUP + 7) / 8;  // tiles of 8 query heads
constexpr int STEPS = HEAD_DIM / 16;      // tensor-core steps over a head
constexpr int SHARE = (STEPS + WARPS - 1) / WARPS;
constexpr int TILE = 16 * WARPS;          // tokens
// A stage: [keys, values][panel of 64 dimensions][token] of 128 bytes, 16-byte pieces swizzled.
constexpr int PANEL = TILE * 128;
constexpr int PANELS = (HEAD_DIM + 63) / 64;
constexpr int VALUES = PANELS * PANEL;
constexpr int STAGE = 2 * VALUES;
// float4 of a warp's sums: all steps in shared memory, its share in scratch; then maxima, totals.
constexpr int WHOLE = COLUMNS * (STEPS + 1) * 32;
constexpr int PART = COLUMNS * (SHARE + 1) * 32;

static_assert(HEAD_DIM % 16 == 0, "tensor cores take steps of 16 dimensions");

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

/** A stretch of the tiles of one row and head; `all` are all of these. */
struct Piece {
  int row, kvHead, tile, tiles, all, first, length;
  u32 start;  // where on the line the tiles of this row and head begin
};

/** Walks the pieces of this block's stretch of the line; every warp walks it by itself. */
struct Walk {
  const int *lengths;
  int window, row, kvHead;
  u32 at, end, itemStart;
  u32 blocks, each, longer;  // of `blocks` the first `longer` take each + 1 tiles, the others each

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

  __device__ __forceinline__ Walk(const Arguments &a) : lengths(a.lengths), window(a.window) {
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
    blocks = min(gridDim.x, total);
    each = total / max(1u, blocks);
    longer = total - each * blocks;
    at = startOf(min(blockIdx.x, blocks));
    end = startOf(min(blockIdx.x + 1, blocks));
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

/**
 * The token that a tile begins with. The oldest tile begins with the sequence, and ends where the
 * next one begins: what it would lack is not in memory. Below 0 only if the sequence is shorter.
 */
__device__ __forceinline__ int firstToken(const Piece &p, int tile) {
  const int token = p.length - (tile + 1) * TILE;
  return p.length >= TILE ? max(0, token) : token;
}

/**
 * Starts filling a stage with a tile's keys and values. Tokens before the first that is seen are
 * hidden later; in their place that one is copied again. The copy engine would do such a tile, too,
 * and heads that end within a panel, but for what is outside of the tensor it touches the tensor's
 * first address, which need not be mapped.
 */
__device__ __forceinline__ void copyTile(const Arguments &a, const Piece &p, int slot, int token,
                                         u32 to, u32 filled) {
  const int lane = threadIdx.x % 32, row = a.headRow + p.kvHead;
#if __CUDA_ARCH__ >= 900
  if (token >= 0 && HEAD_DIM % 64 == 0) {
    if (lane == 0) barrierExpect(filled, STAGE);
    else barrierArrive(filled);
    __syncwarp();
    if (lane >= 2 * PANELS) return;
    const int headRow = row + lane / PANELS * KV_HEADS;
    loadBox(to + lane * PANEL, a.map, lane % PANELS * 64, headRow, token, slot, filled);
    return;
  }
#endif
  constexpr int CHUNKS = HEAD_DIM / 8;
  const unsigned char *keys = a.kv + (u64)slot * a.slotStride + (u64)row * (HEAD_DIM * 2);
  for (int i = lane; i < 2 * TILE * CHUNKS && p.length > 0; i += 32) {
    const int chunk = i % CHUNKS, t = i / CHUNKS % TILE, values = i >= TILE * CHUNKS;
    const unsigned char *from = keys + (u64)max(token + t, p.first) * a.tokenStride;
    copy16(to + values * VALUES + chunk / 8 * PANEL + t * 128 + ((chunk ^ t) & 7) * 16,
           from + values * (KV_HEADS * HEAD_DIM * 2) + chunk * 16);
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(filled) : "memory");
}

/**
 * Copies the tiles of this block's pieces into the ring, one stage after another. Only a sequence's
 * last token, in the first of its tiles, may still be on its way when the kernel begins.
 */
__device__ __forceinline__ void produce(const Arguments &a, u32 stages, u32 full, u32 empty) {
  releaseDependents();
  Walk walk(a);
  Piece p;
  int stage = 0;
  u32 parity = 1;
  bool all = false;
  while (walk.next(p)) {
    const int slot = a.slots[p.row];
    for (int tile = p.tile; tile < p.tile + p.tiles; tile++) {
      barrierWait(empty + stage * 8, parity);
      if (tile == 0 && !all) awaitInputs(), all = true;
      copyTile(a, p, slot, firstToken(p, tile), stages + stage * STAGE, full + stage * 8);
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
  }
}

/** Where ldmatrix finds step k of a token's dimensions; `half` is the lane's 16 bytes of 32. */
__device__ __forceinline__ u32 stepAt(u32 panels, int token, int half, int k) {
  return panels + k / 4 * PANEL + token * 128 + ((k % 4 * 32) ^ ((half ^ (token & 7)) * 16));
}

/** Adds 16 tokens from `token` of a stage on to the state; of all only begin … end - 1 are seen. */
__device__ __forceinline__ void attend(const Arguments &a, Sums<STEPS> &state, u32 keys, int token,
                                       const u32 (&q)[COLUMNS][STEPS][2], int begin, int end) {
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
    loadTransposed(matrix, stepAt(keys + VALUES, row, lane / 8 % 2, k));
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) multiply(state.o[c][k], matrix, weights[c][0], weights[c][1]);
  }
}

/** What this multiprocessor keeps of other kernels' memory may be from before the last step. */
__device__ __forceinline__ void forgetCached(const int *any) {
  asm volatile("{ .reg .s32 t; ld.acquire.gpu.global.s32 t, [%0]; }" ::"l"(any) : "memory");
}

/** The warps that attend wait for each other. */
__device__ __forceinline__ void meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
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

__device__ __forceinline__ void consume(const Arguments &a, u32 stages, u32 full, u32 empty,
                                        float4 *area) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Walk walk(a);
  awaitPredecessor();
  Piece p;
  int stage = 0;
  u32 parity = 0;
  while (walk.next(p)) {
    const u64 item = (u64)p.row * KV_HEADS + p.kvHead;
    const u64 group = item * GROUP * HEAD_DIM;
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
      const int from = firstToken(p, tile);
      const int begin = p.first - from, end = p.length - tile * TILE - from;
      attend(a, state, stages + stage * STAGE, warp * 16, q, begin, end);
      __syncwarp();
      if (lane == 0) barrierArrive(empty + stage * 8);
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    state.total();
    // From here on a warp has all tokens, for its share of the dimensions.
    Sums<SHARE> sums;
    const int first = warp * SHARE;
    state.store(area + warp * WHOLE);
    meet();
    sums.gather<STEPS>(WARPS, [&](int w) { return area + w * WHOLE; }, first);
    meet();
    if (p.tiles < p.all) {
      const u32 from = walk.blockOf(p.start), to = walk.blockOf(p.start + p.all - 1);
      const auto part = [&](int i) {
        // A block has at most a part of what began before its stretch, and one of what goes on.
        const u32 place = (from + i) * 2 + (i == 0);
        return a.partial + (place * WARPS + warp) * PART;
      };
      sums.store(part(blockIdx.x - from));
      if (!arriveLast(a.arrivals + item * WARPS + warp, to - from + 1)) continue;
      sums.gather<SHARE>(to - from + 1, part, 0);
    }
    sums.output(a.out + group, first);
  }
}

extern "C" __global__ void __launch_bounds__((WARPS + 1) * 32)
    attentionDecode(const bf16 *q, bf16 *out, const __grid_constant__ TensorMap map,
                    const unsigned char *kv, const int *slots, const int *lengths, int rows,
                    int window, int headRow, u64 slotStride, u64 tokenStride, float scale,
                    float softcap, float4 *partial, u32 *arrivals) {
  const Arguments a = {q, out, &map, kv, slots, lengths, rows, window, headRow, slotStride,
                       tokenStride, scale, softcap, partial, arrivals};
  const u32 stages = address(shared);
  float4 *const area = (float4 *)(shared + STAGES * STAGE);
  const u32 full = address(area + WARPS * WHOLE), empty = full + STAGES * 8;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrierInit(full + s * 8, 32);
      barrierInit(empty + s * 8, WARPS);
    }
  }
  if (threadIdx.x == 32) prefetchMap(&map);
  barriersReady();
  forgetCached(lengths);
  if (threadIdx.x / 32 == WARPS) produce(a, stages, full, empty);
  else consume(a, stages, full, empty, area);
}
