// Owns causal attention of stretches of sequences over their keys and values in strided memory, for
// any GPU with bf16 tensor cores (8.0 and later).
//
// q, out  [rows, heads, HEAD_DIM] bf16; the GROUP query heads of a key/value head are neighbours.
// kv      address(slot, token) = kv + slot·slotStride + token·tokenStride, in bytes; at keyOffset
//         from there lie [KV_HEADS, HEAD_DIM] bf16 keys, directly behind them the values.
// firstRows, starts, counts, slots  [segments] int32: rows firstRows[i] … + counts[i] - 1 are the
//         tokens of slot slots[i] at positions starts[i] …; keys and values are there already.
//         A token at position p sees tokens max(0, p + 1 - window) … p; a count may be 0.
//
// FlashAttention-2 (Dao 2023): a warp keeps 16 rows' sums in registers while tiles of keys and
// values pass through shared memory. The rows of a tile are a token's GROUP heads, then the next
// token's: heads that share keys share their reading, and short stretches fill a tile.
// Sums and softmax are float32: ‖error‖ ≤ 1e-2 of bf16 results, oracle test/cuda/attention.ts.
//
// -D HEAD_DIM GROUP KV_HEADS KEYS (tokens a tile) [SOFTCAP]

#include "tensor-core.cuh"

constexpr int WARPS = 4;
constexpr int ROWS = 16 * WARPS;
constexpr int STEPS = HEAD_DIM / 16;      // tensor-core steps over a head
constexpr int PITCH = HEAD_DIM * 2 + 16;  // 16 more: ldmatrix then meets every bank once
constexpr int KEY_STAGE = KEYS * PITCH;

static_assert(HEAD_DIM % 16 == 0 && KEYS % 16 == 0, "shapes");

extern __shared__ __align__(128) unsigned char shared[];

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING> __device__ __forceinline__ void waitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

struct Arguments {
  const bf16 *q;
  bf16 *out;
  const unsigned char *kv;
  const int *firstRows, *starts, *counts, *slots;
  int segments, window;
  u64 slotStride, tokenStride, keyOffset;
  float scale, softcap;
};

/** ROWS rows of one segment's (token, head) pairs that share a key/value head. */
struct Tile {
  int kvHead, row, rows;  // the first pair; how many the segment has
  int start, firstRow;
  const unsigned char *keys;
};

/** Tiles of all segments in one line, each segment's last (longest) first; heads go fastest. */
struct Line {
  int segment = 0;
  int before = 0;

  __device__ __forceinline__ bool find(const Arguments &a, int unit, Tile &tile) {
    for (; segment < a.segments; segment++) {
      const int rows = a.counts[segment] * GROUP, tiles = (rows + ROWS - 1) / ROWS;
      const int at = unit - before;
      if (at < tiles * KV_HEADS) {
        tile.kvHead = at % KV_HEADS;
        tile.row = (tiles - 1 - at / KV_HEADS) * ROWS;
        tile.rows = rows;
        tile.start = a.starts[segment];
        tile.firstRow = a.firstRows[segment];
        tile.keys = a.kv + (u64)a.slots[segment] * a.slotStride + a.keyOffset +
                    tile.kvHead * (HEAD_DIM * 2);
        return true;
      }
      before += tiles * KV_HEADS;
    }
    return false;
  }
};

/** Where a pair's query lies, in elements of q and of out. */
__device__ __forceinline__ u64 elementOf(const Tile &tile, int pair) {
  const u64 row = tile.firstRow + pair / GROUP;
  return (row * KV_HEADS * GROUP + tile.kvHead * GROUP + pair % GROUP) * HEAD_DIM;
}

/** Starts copying KEYS tokens' keys (or values) from `token` on; past `last`, that one again. */
__device__ __forceinline__ void copyTokens(const Arguments &a, const unsigned char *from, u32 to,
                                           int token, int last) {
  constexpr int CHUNKS = HEAD_DIM / 8;
#pragma unroll
  for (int i = threadIdx.x; i < KEYS * CHUNKS; i += WARPS * 32) {
    const int t = i / CHUNKS, chunk = i % CHUNKS;
    const u64 offset = (u64)min(token + t, last) * a.tokenStride;
    copy16(to + t * PITCH + chunk * 16, from + offset + chunk * 16);
  }
}

__device__ __forceinline__ void attend(const Arguments &a, const Tile &tile) {
  constexpr int VALUES = KV_HEADS * HEAD_DIM * 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 queries = address(shared), keys = queries + ROWS * PITCH, values = keys + 2 * KEY_STAGE;
  const int firstToken = tile.row / GROUP, lastPair = min(tile.row + ROWS, tile.rows) - 1;
  const int first = tile.start + firstToken, last = tile.start + lastPair / GROUP;
  const int from = max(0, first + 1 - a.window) / KEYS, to = last / KEYS;

  constexpr int CHUNKS = HEAD_DIM / 8;
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += WARPS * 32) {
    const int r = i / CHUNKS, chunk = i % CHUNKS;
    const bf16 *q = a.q + elementOf(tile, min(tile.row + r, tile.rows - 1));
    copy16(queries + r * PITCH + chunk * 16, q + chunk * 8);
  }
  copyTokens(a, tile.keys, keys, from * KEYS, last);
  commit();
  copyTokens(a, tile.keys + VALUES, values, from * KEYS, last);
  commit();

  float o[STEPS * 2][4] = {}, top[2] = {NONE, NONE}, total[2] = {0, 0};
  int position[2];
#pragma unroll
  for (int h = 0; h < 2; h++)
    position[h] = tile.start + (tile.row + warp * 16 + lane / 4 + h * 8) / GROUP;

  for (int j = from; j <= to; j++) {
    const int stage = (j - from) % 2;
    if (j < to) copyTokens(a, tile.keys, keys + (1 - stage) * KEY_STAGE, (j + 1) * KEYS, last);
    commit();
    waitCopies<2>();
    __syncthreads();
    float s[KEYS / 8][4] = {};
    const u32 queryLane = queries + (warp * 16 + lane % 16) * PITCH + lane / 16 * 16;
    const u32 keyLane = keys + stage * KEY_STAGE + (lane % 8 + lane / 16 * 8) * PITCH +
                        lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      u32 q[4];
      loadMatrices(q, queryLane + k * 32);
#pragma unroll
      for (int n = 0; n < KEYS / 16; n++) {
        u32 b[4];
        loadMatrices(b, keyLane + n * 16 * PITCH + k * 32);
        multiply(s[2 * n], q, b[0], b[1]);
        multiply(s[2 * n + 1], q, b[2], b[3]);
      }
    }
    const bool edge = j * KEYS + KEYS - 1 > first || j * KEYS <= last - a.window;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        s[n][i] *= a.scale * LOG2E;
#ifdef SOFTCAP
        s[n][i] = softCap(s[n][i], a.softcap);
#endif
        const int token = j * KEYS + n * 8 + lane % 4 * 2 + i % 2, p = position[i / 2];
        if (edge && (token > p || token <= p - a.window)) s[n][i] = NONE;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float most = top[h];
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) most = fmaxf(most, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const float zero = most == NONE ? 0 : most, decay = exp2(top[h] - zero);
      top[h] = most;
      total[h] *= decay;
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
        s[n][2 * h] = exp2(s[n][2 * h] - zero);
        s[n][2 * h + 1] = exp2(s[n][2 * h + 1] - zero);
        total[h] += s[n][2 * h] + s[n][2 * h + 1];
      }
#pragma unroll
      for (int n = 0; n < STEPS * 2; n++) o[n][2 * h] *= decay, o[n][2 * h + 1] *= decay;
    }
    waitCopies<1>();
    __syncthreads();
    const u32 valueLane = values + stage * KEY_STAGE + lane % 16 * PITCH + lane / 16 * 16;
    if (j < to)
      copyTokens(a, tile.keys + VALUES, values + (1 - stage) * KEY_STAGE, (j + 1) * KEYS, last);
    commit();
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
      const u32 p[4] = {pack(s[2 * k][0], s[2 * k][1]), pack(s[2 * k][2], s[2 * k][3]),
                        pack(s[2 * k + 1][0], s[2 * k + 1][1]),
                        pack(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < STEPS; n++) {
        u32 b[4];
        loadTransposed(b, valueLane + k * 16 * PITCH + n * 32);
        multiply(o[2 * n], p, b[0], b[1]);
        multiply(o[2 * n + 1], p, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    total[h] += __shfl_xor_sync(~0u, total[h], 1);
    total[h] += __shfl_xor_sync(~0u, total[h], 2);
    const int pair = tile.row + warp * 16 + lane / 4 + h * 8;
    if (pair >= tile.rows) continue;
    u32 *out = (u32 *)(a.out + elementOf(tile, pair)) + lane % 4;
    const float by = 1 / total[h];
#pragma unroll
    for (int n = 0; n < STEPS * 2; n++) out[n * 4] = pack(o[n][2 * h] * by, o[n][2 * h + 1] * by);
  }
  waitCopies<0>();
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    attentionPrefill(const bf16 *q, bf16 *out, const unsigned char *kv, const int *firstRows,
                     const int *starts, const int *counts, const int *slots, int segments,
                     int window, u64 slotStride, u64 tokenStride, u64 keyOffset, float scale,
                     float softcap) {
  const Arguments a = {q, out, kv, firstRows, starts, counts, slots, segments, window,
                       slotStride, tokenStride, keyOffset, scale, softcap};
  awaitPredecessor();
  Line line;
  Tile tile;
  for (int unit = blockIdx.x; line.find(a, unit, tile); unit += gridDim.x) attend(a, tile);
}
