// Owns attention as a phase of a decode step in one kernel. The tokens of a sequence are cut into
// SPLITS stretches for each key/value head; a block takes one, and the last block to finish with a
// head merges its stretches (flash decoding, Dao et al. 2023). Keys and values of earlier tokens
// are asked for before the block waits for this token's query. float32 throughout.
//
// Before: -D SPLITS and those of phases.cuh. Work for TOKENS · KV_HEADS · SPLITS blocks at most.
#pragma once
#include "weight-stream.cuh"

constexpr int GROUP = HEADS / KV_HEADS;
constexpr int LANES = HEAD_DIM / 8;   // of a token
constexpr int PER = 32 / LANES;       // tokens side by side in a warp
constexpr int STRIDE = WARPS * PER;   // and in a block
constexpr int BATCH = 6;              // of these under way at once
constexpr int RESULT = GROUP * HEAD_DIM;
// By warp and query head: weighted sums of values; then maxima and totals.
constexpr int ATTENTION_BYTES = WARPS * GROUP * (HEAD_DIM + 2) * 4;
constexpr float NONE = -1e30f;  // of no token; its weight is 0 beside any other

static_assert(HEAD_DIM % 8 == 0 && 32 % LANES == 0, "lanes share a token");

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

__device__ __forceinline__ float power(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

/** Weighted sums relative to maximum m (in powers of two), and the total of weights. */
struct Part {
  float m = NONE, l = 0.f;
};

/** What each of two parts is multiplied by to be added to the other. */
__device__ __forceinline__ float2 join(Part& a, const Part& b) {
  const float top = fmaxf(a.m, b.m);
  const float2 by = make_float2(power(a.m - top), power(b.m - top));
  a = {top, a.l * by.x + b.l * by.y};
  return by;
}

struct Stretch {
  uint4 keys[BATCH], values[BATCH];
  const unsigned char* head;
  u64 tokenStride;
  /** Of this lane, the first. */
  int token;

  __device__ __forceinline__ const unsigned char* place(int b) const {
    return head + (u64)(token + b * STRIDE) * tokenStride;
  }

  /** Tokens that were there before this launch. */
  __device__ __forceinline__ void prefetch(int end) {
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const bool some = token + b * STRIDE < end;
      keys[b] = some ? loadStream(place(b)) : make_uint4(0, 0, 0, 0);
      values[b] = some ? loadStream(place(b) + KV_HEADS * HEAD_DIM * 2) : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ void loadKeys(int begin, int end) {
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int at = token + b * STRIDE;
      if (at >= begin && at < end) keys[b] = loadFresh(place(b));
    }
  }
  __device__ __forceinline__ void loadValues(int begin, int end) {
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const int at = token + b * STRIDE;
      if (at >= begin && at < end) values[b] = loadFresh(place(b) + KV_HEADS * HEAD_DIM * 2);
    }
  }
};

/** A float4 of two, relative to a common maximum: sums of N parts with their weights. */
template <int N, typename Tail, typename Sums>
__device__ __forceinline__ Part merge(int count, Tail tail, Sums sums, float2& into, Part whole) {
  float2 t[N], x[N];
#pragma unroll
  for (int i = 0; i < N; i++) t[i] = tail(min(i, count - 1)), x[i] = sums(min(i, count - 1));
  float top = whole.m;
#pragma unroll
  for (int i = 0; i < N; i++) top = fmaxf(top, t[i].x);
  const float keep = power(whole.m - top);
  whole = {top, whole.l * keep};
  into.x *= keep, into.y *= keep;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const float by = i < count ? power(t[i].x - top) : 0.f;
    whole.l += t[i].y * by;
    into.x += x[i].x * by, into.y += x[i].y * by;
  }
  return whole;
}

/**
 * `area`: ATTENTION_BYTES of shared memory. `before`, `after`: arrivals of phases. `trace`, `count`,
 * `p`: for MARK.
 */
__device__ __forceinline__ void attend(const Phase& phase, const AttentionMemory& memory,
                                       const u32* before, u32* after, float* area,
                                       long long* trace, int count, int p) {
  const int item = blockIdx.x;
  if (item >= TOKENS * KV_HEADS * SPLITS) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int split = item % SPLITS, tokenHead = item / SPLITS;
  const int kvHead = tokenHead % KV_HEADS, t = tokenHead / KV_HEADS;
  const int length = memory.lengths[t], seen = min(length, phase.window);
  const int each = (seen + SPLITS - 1) / SPLITS;
  const int from = length - seen + split * each, to = min(length, from + each);

  Stretch stretch;
  stretch.head = (const unsigned char*)memory.slots[t] + phase.layerOffset +
                 kvHead * HEAD_DIM * 2 + lane % LANES * 16;
  stretch.tokenStride = memory.tokenStride;
  stretch.token = from + warp * PER + lane / LANES;
  stretch.prefetch(min(to, length - 1));
  await(before, phase.arrivals);
  MARK(p, 1);
  stretch.loadKeys(length - 1, to);
  stretch.loadValues(length - 1, to);
  uint4 q[GROUP];
  const bf16* query = phase.in + ((u64)t * HEADS + kvHead * GROUP) * HEAD_DIM;
#pragma unroll
  for (int g = 0; g < GROUP; g++) q[g] = loadFresh(query + g * HEAD_DIM + lane % LANES * 8);

  Part part[GROUP];
  float o[GROUP][8] = {};
  for (int tile = from; tile < to; tile += BATCH * STRIDE) {
    float s[BATCH][GROUP];
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      const bool some = stretch.token + b * STRIDE < to;
      // The same for the whole block.
      if (tile + b * STRIDE >= to) {
#pragma unroll
        for (int g = 0; g < GROUP; g++) s[b][g] = NONE;
        continue;
      }
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        float score = dot8(stretch.keys[b], q[g], 0.f);
#pragma unroll
        for (int d = LANES / 2; d; d >>= 1) score += __shfl_xor_sync(~0u, score, d);
        s[b][g] = some ? score * memory.scale : NONE;
      }
    }
    const int token = stretch.token;
    stretch.token += BATCH * STRIDE;
    stretch.loadKeys(0, to);
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      Part tilePart;
#pragma unroll
      for (int b = 0; b < BATCH; b++) tilePart.m = fmaxf(tilePart.m, s[b][g]);
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        const bool some = token + b * STRIDE < to;
        s[b][g] = some ? power(s[b][g] - tilePart.m) : 0.f;
        tilePart.l += s[b][g];
      }
      const float2 by = join(part[g], tilePart);
#pragma unroll
      for (int b = 0; b < BATCH; b++) s[b][g] *= by.y;
#pragma unroll
      for (int i = 0; i < 8; i++) o[g][i] *= by.x;
    }
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
      if (tile + b * STRIDE >= to) continue;
      float v[8];
      unpack8(stretch.values[b], v);
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
#pragma unroll
        for (int i = 0; i < 8; i++) o[g][i] = fmaf(s[b][g], v[i], o[g][i]);
      }
    }
    stretch.loadValues(0, to);
  }

  float* const tails = area + WARPS * RESULT;
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
#pragma unroll
    for (int d = LANES; d < 32; d <<= 1) {
      Part other;
      other.m = __shfl_xor_sync(~0u, part[g].m, d), other.l = __shfl_xor_sync(~0u, part[g].l, d);
      const float2 by = join(part[g], other);
#pragma unroll
      for (int i = 0; i < 8; i++)
        o[g][i] = o[g][i] * by.x + __shfl_xor_sync(~0u, o[g][i], d) * by.y;
    }
    if (lane < LANES) {
      float4* place = (float4*)(area + (warp * GROUP + g) * HEAD_DIM) + lane * 2;
      place[0] = make_float4(o[g][0], o[g][1], o[g][2], o[g][3]);
      place[1] = make_float4(o[g][4], o[g][5], o[g][6], o[g][7]);
    }
    if (lane == 0) {
      tails[(warp * GROUP + g) * 2] = part[g].m;
      tails[(warp * GROUP + g) * 2 + 1] = part[g].l;
    }
  }
  __syncthreads();

  // Two dimensions a thread: first over the block's warps, then over the head's blocks.
  float2* const parts = (float2*)(memory.partial + (u64)TOKENS * KV_HEADS * SPLITS * RESULT);
  for (int e = threadIdx.x * 2; e < RESULT; e += THREADS * 2) {
    const int g = e / HEAD_DIM;
    float2 sum = make_float2(0.f, 0.f);
    const Part whole = merge<WARPS>(
        WARPS, [&](int w) { return ((const float2*)tails)[w * GROUP + g]; },
        [&](int w) { return *(const float2*)(area + w * RESULT + e); }, sum, Part());
    *(float2*)(memory.partial + (u64)item * RESULT + e) = sum;
    if (e % HEAD_DIM == 0) parts[item * GROUP + g] = make_float2(whole.m, whole.l);
  }
  __shared__ u32 arrived;
  __syncthreads();
  MARK(p, 2);
  if (threadIdx.x == 0) arrived = arriveAfter(memory.arrivals + tokenHead);
  __syncthreads();
  if (arrived != SPLITS - 1) return;

  bf16* const out = (bf16*)phase.out + (u64)tokenHead * RESULT;
  for (int e = threadIdx.x * 2; e < RESULT; e += THREADS * 2) {
    const int g = e / HEAD_DIM, first = tokenHead * SPLITS;
    float2 sum = make_float2(0.f, 0.f);
    Part whole;
    constexpr int ONCE = SPLITS < 16 ? SPLITS : 16;
    for (int s = 0; s < SPLITS; s += ONCE) {
      whole = merge<ONCE>(
          min(ONCE, SPLITS - s),
          [&](int i) { return freshPair(parts + (first + s + i) * GROUP + g); },
          [&](int i) {
            return freshPair((const float2*)(memory.partial + (u64)(first + s + i) * RESULT + e));
          },
          sum, whole);
    }
    const float by = whole.l > 0.f ? 1.f / whole.l : 0.f;
    *(u32*)(out + e) = pack(sum.x * by, sum.y * by);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    memory.arrivals[tokenHead] = 0;
    arrive(after);
  }
}
