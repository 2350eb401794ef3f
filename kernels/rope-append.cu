// Owns the step from a row of projections to attention's inputs: each head of q and k is normed
// (if its family does that) and rotated, q goes to rows of its own, k and v to the token's place
// in its slot. One warp a head of a token, two pairs a lane, so that all access is 4 bytes wide.
// Reads 2·(heads + 2·kvHeads)·headDim bytes a token and writes as many: 24 KiB for an 8B model,
// 64 tokens 1.6 MB, launch-bound (2–3 µs). One rounding (two with a head norm). Oracle:
// test/cuda/rope.gpu.ts.
#include "fp8.cuh"
#include "rope.cuh"

#define TWOS 2          // pairs of pairs of a lane: headDim ≤ 256
#define PAIRS_MAX 128

/** Where the elements of pairs p and p + 1 lie, p even: as two runs of two elements. */
struct Two {
  /** The first run has both pairs' first elements; else it is the first pair. */
  bool apart;
  int first, second;
};

__device__ __forceinline__ Two twoOf(const Rope& rope, int p) {
  int2 at = pairOf(rope, p);
  bool apart = at.y != at.x + 1;
  return {apart, at.x, apart ? at.y : at.x + 2};
}

/** Elements a, b of the first pair and of the second. */
__device__ __forceinline__ float4 unpackTwo(const Two& two, u32 x, u32 y) {
  if (two.apart) return make_float4(low(x), low(y), high(x), high(y));
  return make_float4(low(x), high(x), low(y), high(y));
}

/** RMS norm over a head, in a warp; weights by element. Rounds as a norm of its own would. */
__device__ __forceinline__ void normHead(float4* v, const float* weight, const Rope& rope,
                                         int headDim, float eps, int lane) {
  float sum = 0.f;
  for (int c = 0; c < TWOS; c++) {
    sum += v[c].x * v[c].x + v[c].y * v[c].y + v[c].z * v[c].z + v[c].w * v[c].w;
  }
  float scale = rsqrtf(warpSum(sum) / headDim + eps);
  for (int c = 0; c < TWOS; c++) {
    int p = 2 * (lane + 32 * c);
    if (p >= headDim >> 1) break;
    int2 one = pairOf(rope, p), other = pairOf(rope, p + 1);
    v[c].x = rounded(v[c].x * scale * weight[one.x]);
    v[c].y = rounded(v[c].y * scale * weight[one.y]);
    v[c].z = rounded(v[c].z * scale * weight[other.x]);
    v[c].w = rounded(v[c].w * scale * weight[other.y]);
  }
}

/**
 * q, k, v: rows `stride` elements apart; a null q or k is left out. qOut: [rows, heads·headDim].
 * qNorm, kNorm: null for none. layerOffset: bytes from a token's start to the layer's keys, behind
 * which its values lie.
 */
template <bool SCALED>
__device__ __forceinline__ void append(const bf16* q, const bf16* k, const bf16* v, int qStride,
                                       int kvStride, bf16* qOut, const int* positions,
                                       const u64* slots, const Rope& rope, const float* qNorm,
                                       const float* kNorm, float eps, int heads, int kvHeads,
                                       int headDim, u64 tokenStride, u64 layerOffset,
                                       Scales scales) {
  awaitInputs();
  releaseDependents();
  __shared__ float2 turns[PAIRS_MAX];
  int row = blockIdx.x, lane = threadIdx.x & 31;
  int position = positions[row];
  u64 slot = slots[row];
  // A row that pads the batch has no sequence: it writes nowhere.
  if (slot == 0) return;
  float token = SCALED ? widen(scales.tokens[row]) : 1.f;
  // All heads of a row turn alike.
  for (int p = threadIdx.x; p < headDim >> 1; p += blockDim.x) turns[p] = turnOf(rope, p, position);
  __syncthreads();
  bf16* place = (bf16*)(slot + position * tokenStride + layerOffset);
  int queries = q ? heads : 0, all = queries + (k ? 2 * kvHeads : 0);
  int warps = blockDim.x >> 5;
  for (int h = blockIdx.y * warps + (threadIdx.x >> 5); h < all; h += gridDim.y * warps) {
    int kind = h < queries ? 0 : h < queries + kvHeads ? 1 : 2;
    const bf16* from;
    bf16* to;
    if (kind == 0) {
      from = q + (u64)row * qStride + h * headDim;
      to = qOut + ((u64)row * heads + h) * headDim;
    } else {
      int head = h - queries - (kind == 2 ? kvHeads : 0);
      from = (kind == 1 ? k : v) + (u64)row * kvStride + head * headDim;
      to = place + (h - queries) * headDim;
    }
    float4 x[TWOS] = {};
#pragma unroll
    for (int c = 0; c < TWOS; c++) {
      int p = 2 * (lane + 32 * c);
      if (p >= headDim >> 1) break;
      Two two = twoOf(rope, p);
      x[c] = unpackTwo(two, *(const u32*)(from + two.first), *(const u32*)(from + two.second));
      if (SCALED) {
        const bf16* rows = scales.rows + h * headDim;
        u32 first = *(const u32*)(rows + two.first), second = *(const u32*)(rows + two.second);
        float4 by = unpackTwo(two, first, second);
        x[c].x *= by.x * token, x[c].y *= by.y * token;
        x[c].z *= by.z * token, x[c].w *= by.w * token;
      }
    }
    const float* weight = kind == 0 ? qNorm : kind == 1 ? kNorm : nullptr;
    if (weight) normHead(x, weight, rope, headDim, eps, lane);
#pragma unroll
    for (int c = 0; c < TWOS; c++) {
      int p = 2 * (lane + 32 * c);
      if (p >= headDim >> 1) break;
      if (kind != 2) {
        turn(turns[p], x[c].x, x[c].y);
        turn(turns[p + 1], x[c].z, x[c].w);
      }
      Two two = twoOf(rope, p);
      *(u32*)(to + two.first) = two.apart ? pack(x[c].x, x[c].z) : pack(x[c].x, x[c].y);
      *(u32*)(to + two.second) = two.apart ? pack(x[c].y, x[c].w) : pack(x[c].z, x[c].w);
    }
  }
}

extern "C" __global__ void ropeAppend(const bf16* q, const bf16* k, const bf16* v, int qStride,
                                      int kvStride, bf16* qOut, const int* positions,
                                      const u64* slots, const float* frequencies, int dimensions,
                                      int interleaved, float magnitude, const float* qNorm,
                                      const float* kNorm, float eps, int heads, int kvHeads,
                                      int headDim, u64 tokenStride, u64 layerOffset) {
  append<false>(q, k, v, qStride, kvStride, qOut, positions, slots,
                {frequencies, dimensions, interleaved, magnitude}, qNorm, kNorm, eps, heads,
                kvHeads, headDim, tokenStride, layerOffset, {});
}

/** The same of a product of e4m3 that made all of q, k and v, side by side. */
extern "C" __global__ void ropeAppendScaled(
    const bf16* q, const bf16* k, const bf16* v, int qStride, int kvStride, bf16* qOut,
    const int* positions, const u64* slots, const float* frequencies, int dimensions,
    int interleaved, float magnitude, const float* qNorm, const float* kNorm, float eps, int heads,
    int kvHeads, int headDim, u64 tokenStride, u64 layerOffset, const bf16* rowScales,
    const bf16* tokenScales) {
  append<true>(q, k, v, qStride, kvStride, qOut, positions, slots,
               {frequencies, dimensions, interleaved, magnitude}, qNorm, kNorm, eps, heads, kvHeads,
               headDim, tokenStride, layerOffset, {rowScales, tokenScales});
}
