// Owns attention as a phase of a decode step in one kernel. The tokens of a sequence are cut into
// SPLITS stretches for each key/value head; a block takes one, and the last block to finish with a
// head merges its stretches (flash decoding, Dao et al. 2023). Earlier tokens' keys and values are
// brought to L2 while the block still multiplies, and to registers while it waits for the query.
//
// A warp takes 16 tokens: S' = K·Q', O' = V'·P' by tensor cores, whose 8 columns are the heads that
// share keys. Fragments come straight from memory: which dimension is which row of a fragment is
// free as long as both operands agree, so a lane reads whole 16 bytes.
//
// Before: -D SPLITS and those of phases.cuh. Work for TOKENS · KV_HEADS · SPLITS blocks at most.
#pragma once
#include "weight-stream.cuh"

constexpr int GROUP = HEADS / KV_HEADS;
constexpr int RESULT = GROUP * HEAD_DIM;
constexpr int TILE = 16 * WARPS;        // tokens
constexpr int STEPS = HEAD_DIM / 16;    // tensor-core steps over a head
constexpr int PAIRS_ROW = HEAD_DIM / 16;  // of values, in a lane
// By warp and query head: weighted sums of values; then maxima and totals.
constexpr int ATTENTION_BYTES = WARPS * GROUP * (HEAD_DIM + 2) * 4;
constexpr float HIDDEN = -1e30f;  // a score of no token: its weight is 0 beside any other

static_assert(HEAD_DIM % 32 == 0 && GROUP <= 8, "heads fit the fragments");

struct AttentionMemory {
  /** [TOKENS]: what a token sees, itself included; 0 for rows that pad the batch. */
  const int* lengths;
  const u64* slots;
  u64 tokenStride;
  float scale;
  /** By item: RESULT sums; after all of these, GROUP pairs of maximum and total. */
  float* partial;
  /** [TOKENS · KV_HEADS], zero before and after. */
  u32* arrivals;
};

__device__ __forceinline__ u32 transpose(u32 x) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
  return r;
}

/** Weighted sums relative to maximum m (in powers of two), and the total of weights. */
struct Part {
  float m = HIDDEN, l = 0.f;
};

/** Adds `count` ≤ N parts to `whole`, and two dimensions of their sums to `into`. */
template <int N, typename Tail, typename Sums>
__device__ __forceinline__ Part merge(int count, Tail tail, Sums sums, float2& into, Part whole) {
  float2 t[N], x[N];
#pragma unroll
  for (int i = 0; i < N; i++) t[i] = tail(min(i, count - 1)), x[i] = sums(min(i, count - 1));
  float top = whole.m;
#pragma unroll
  for (int i = 0; i < N; i++) top = fmaxf(top, t[i].x);
  const float keep = exp2(whole.m - top);
  whole = {top, whole.l * keep};
  into.x *= keep, into.y *= keep;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const float by = i < count ? exp2(t[i].x - top) : 0.f;
    whole.l += t[i].y * by;
    into.x += x[i].x * by, into.y += x[i].y * by;
  }
  return whole;
}

/** This block's stretch of a sequence: tokens from … to - 1 of `length`, for one head of keys. */
struct Stretch {
  int item, tokenHead, t, kvHead, length, from, to;
  const unsigned char* head;
  u64 tokenStride;

  __device__ __forceinline__ Stretch(const Phase& phase, const AttentionMemory& memory)
      : item(blockIdx.x), tokenHead(item / SPLITS), t(tokenHead / KV_HEADS),
        kvHead(tokenHead % KV_HEADS), length(0), from(0), to(0), tokenStride(memory.tokenStride) {
    if (!some()) return;
    length = memory.lengths[t];
    const int seen = min(length, phase.window), each = (seen + SPLITS - 1) / SPLITS;
    from = length - seen + item % SPLITS * each;
    to = min(length, from + each);
    head = (const unsigned char*)memory.slots[t] + phase.layerOffset + kvHead * HEAD_DIM * 2;
  }

  /** Whether this block takes part. */
  __device__ __forceinline__ bool some() const { return item < TOKENS * KV_HEADS * SPLITS; }

  /** Brings what is there of the first tiles to L2. */
  __device__ __forceinline__ void prefetch() const {
    constexpr int LINES = HEAD_DIM / 64 ? HEAD_DIM / 64 : 1;
    const int tokens = min(2 * TILE, min(to, length - 1) - from);
    for (int i = threadIdx.x; i < tokens * 2 * LINES; i += THREADS) {
      const int line = i % LINES, values = i / LINES % 2, token = from + i / (2 * LINES);
      const unsigned char* at = head + (u64)token * tokenStride;
      asm volatile("prefetch.global.L2 [%0];" ::"l"(
          at + values * (KV_HEADS * HEAD_DIM * 2) + line * 128));
    }
  }
};

/** Keys and values of a warp's 16 tokens, in a lane. */
struct Tile {
  /** Tokens lane / 4 and 8 more; chunk j has dimensions (4·j + lane % 4) · 8 and 7 more. */
  uint4 keys[2][HEAD_DIM / 32];
  /** Tokens lane % 4 · 2, one more, and 8 more; HEAD_DIM / 8 dimensions from those · lane / 4. */
  u32 values[4][PAIRS_ROW];

  /** Tokens between `begin` and `end` from `token` on; the others stay as they are. */
  template <bool FRESH>
  __device__ __forceinline__ void loadKeys(const Stretch& s, int token, int begin, int end) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int at = token + lane / 4 + i * 8;
      const unsigned char* from = s.head + (u64)at * s.tokenStride + lane % 4 * 16;
      if (at < begin || at >= end) continue;
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 32; j++) {
        keys[i][j] = FRESH ? loadFresh(from + j * 64) : loadStream(from + j * 64);
      }
    }
  }

  template <bool FRESH>
  __device__ __forceinline__ void loadValues(const Stretch& s, int token, int begin, int end) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int at = token + lane % 4 * 2 + i % 2 + i / 2 * 8;
      const unsigned char* from = s.head + KV_HEADS * HEAD_DIM * 2 + (u64)at * s.tokenStride +
                                  lane / 4 * (HEAD_DIM / 4);
      if (at < begin || at >= end) continue;
      if constexpr (PAIRS_ROW % 4 == 0) {
#pragma unroll
        for (int j = 0; j < PAIRS_ROW; j += 4) {
          const uint4 v = FRESH ? loadFresh(from + j * 4) : loadStream(from + j * 4);
          values[i][j] = v.x, values[i][j + 1] = v.y;
          values[i][j + 2] = v.z, values[i][j + 3] = v.w;
        }
      } else {
#pragma unroll
        for (int j = 0; j < PAIRS_ROW; j += 2) {
          const float2 v = freshPair((const float2*)(from + j * 4));
          values[i][j] = __float_as_uint(v.x), values[i][j + 1] = __float_as_uint(v.y);
        }
      }
    }
  }
};

/** A warp's running result: heads lane % 4 · 2 and one more. */
struct Attended {
  Part part[2];
  /** [step][dimension of two · head of two], dimensions from lane / 4 · HEAD_DIM / 8 on. */
  float o[STEPS][4] = {};

  /** Scores of 16 tokens in units of log2, [token of two · head of two]; hidden from `to` on. */
  __device__ __forceinline__ static void score(float (&x)[4], const Tile& tile,
                                               const uint4 (&q)[HEAD_DIM / 32], float scale,
                                               int token, int to) {
    float s[2][4] = {};
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 32; j++) {
      const uint4 a = tile.keys[0][j], b = tile.keys[1][j];
      multiply(s[0], {a.x, b.x, a.y, b.y}, q[j].x, q[j].y);
      multiply(s[1], {a.z, b.z, a.w, b.w}, q[j].z, q[j].w);
    }
    const int at = token + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = at + i / 2 * 8 < to ? (s[0][i] + s[1][i]) * scale : HIDDEN;
  }

  /** At least one of the scores is of a token. */
  __device__ __forceinline__ void add(float (&x)[4], const Tile& tile) {
    float by[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float top = fmaxf(x[h], x[h + 2]);
#pragma unroll
      for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
      top = fmaxf(top, part[h].m);
      by[h] = exp2(part[h].m - top);
      x[h] = exp2(x[h] - top), x[h + 2] = exp2(x[h + 2] - top);
      part[h] = {top, part[h].l * by[h] + x[h] + x[h + 2]};
    }
    const u32 b0 = transpose(pack(x[0], x[1])), b1 = transpose(pack(x[2], x[3]));
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
#pragma unroll
      for (int j = 0; j < 4; j++) o[i][j] *= by[j % 2];
      const u32 v0 = tile.values[0][i], v1 = tile.values[1][i];
      const u32 v2 = tile.values[2][i], v3 = tile.values[3][i];
      multiply(o[i],
               {__byte_perm(v0, v1, 0x5410), __byte_perm(v0, v1, 0x7632),
                __byte_perm(v2, v3, 0x5410), __byte_perm(v2, v3, 0x7632)},
               b0, b1);
    }
  }

  /** sums: [GROUP, HEAD_DIM]; tails: [GROUP] */
  __device__ __forceinline__ void store(float* sums, float2* tails) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
      for (int d = 4; d < 32; d *= 2) part[h].l += __shfl_xor_sync(~0u, part[h].l, d);
      const int head = lane % 4 * 2 + h;
      if (head >= GROUP) continue;
      float2* const to = (float2*)(sums + head * HEAD_DIM + lane / 4 * (HEAD_DIM / 8));
#pragma unroll
      for (int i = 0; i < STEPS; i++) to[i] = make_float2(o[i][h], o[i][h + 2]);
      if (lane < 4) tails[head] = make_float2(part[h].m, part[h].l);
    }
  }
};

/** area: ATTENTION_BYTES of shared memory; before, after: arrivals of phases. */
__device__ __forceinline__ void attend(const Phase& phase, const AttentionMemory& memory,
                                       const u32* before, u32* after, float* area) {
  const Stretch stretch(phase, memory);
  if (!stretch.some()) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int from = stretch.from, to = stretch.to, item = stretch.item;
  int token = from + warp * 16;
  Tile tile = {};
  tile.loadKeys<false>(stretch, token, 0, min(to, stretch.length - 1));
  tile.loadValues<false>(stretch, token, 0, min(to, stretch.length - 1));
  await(before, phase.arrivals);
  // Of the last token, they came with the query.
  tile.loadKeys<true>(stretch, token, stretch.length - 1, to);
  tile.loadValues<true>(stretch, token, stretch.length - 1, to);
  uint4 q[HEAD_DIM / 32] = {};
  if (lane / 4 < GROUP) {
    const bf16* query = phase.in + (stretch.tokenHead * GROUP + lane / 4) * HEAD_DIM;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 32; j++) q[j] = loadFresh(query + (j * 4 + lane % 4) * 8);
  }

  float2* const tails = (float2*)(area + WARPS * RESULT);
  const int used = max(1, min(WARPS, (to - from + 15) / 16));
  if (warp < used) {
    Attended result;
    while (token < to) {
      float x[4];
      Attended::score(x, tile, q, memory.scale, token, to);
      tile.loadKeys<true>(stretch, token + TILE, 0, to);
      result.add(x, tile);
      token += TILE;
      tile.loadValues<true>(stretch, token, 0, to);
    }
    result.store(area + warp * RESULT, tails + warp * GROUP);
  }
  __syncthreads();

  // Two dimensions a thread: first over the block's warps, then over the head's blocks.
  float2* const parts = (float2*)(memory.partial + (u64)TOKENS * KV_HEADS * SPLITS * RESULT);
  for (int e = threadIdx.x * 2; e < RESULT; e += THREADS * 2) {
    const int g = e / HEAD_DIM;
    float2 sum = make_float2(0.f, 0.f);
    const Part whole = merge<WARPS>(
        used, [&](int w) { return tails[w * GROUP + g]; },
        [&](int w) { return *(const float2*)(area + w * RESULT + e); }, sum, Part());
    *(float2*)(memory.partial + (u64)item * RESULT + e) = sum;
    if (e % HEAD_DIM == 0) parts[item * GROUP + g] = make_float2(whole.m, whole.l);
  }
  __shared__ u32 arrived;
  __syncthreads();
  if (threadIdx.x == 0) arrived = arriveAfter(memory.arrivals + stretch.tokenHead);
  __syncthreads();
  if (arrived != SPLITS - 1) return;

  bf16* const out = (bf16*)phase.out + (u64)stretch.tokenHead * RESULT;
  for (int e = threadIdx.x * 2; e < RESULT; e += THREADS * 2) {
    const int g = e / HEAD_DIM, first = stretch.tokenHead * SPLITS;
    float2 sum = make_float2(0.f, 0.f);
    Part whole;
    constexpr int ONCE = SPLITS < 16 ? SPLITS : 16;
    for (int s = first; s < first + SPLITS; s += ONCE) {
      whole = merge<ONCE>(
          min(ONCE, first + SPLITS - s),
          [&](int i) { return freshPair(parts + (s + i) * GROUP + g); },
          [&](int i) {
            return freshPair((const float2*)(memory.partial + (u64)(s + i) * RESULT + e));
          },
          sum, whole);
    }
    const float by = whole.l > 0.f ? 1.f / whole.l : 0.f;
    *(u32*)(out + e) = pack(sum.x * by, sum.y * by);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    memory.arrivals[stretch.tokenHead] = 0;
    arrive(after);
  }
}
