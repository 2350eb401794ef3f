// Owns the step from a row of projections to attention's inputs: each head of q and k is normed
// (if its family does that) and rotated, q goes to rows of its own, k and v to the token's place
// in its slot. A lane turns eight pairs, loaded and stored 16 bytes at a time; a row's sines are
// made once and serve all its heads. Reads 2·(heads + 2·kvHeads)·headDim bytes a token and writes
// as many: 24 KiB for an 8B model, 50 MB or 17 µs for 2,048 tokens, launch-bound for few. One
// rounding (two with a head norm). Oracle: test/cuda/rope.gpu.ts.
#include "fp8.cuh"
#include "rope.cuh"

#define RUN 8           // pairs of a lane, and elements of each of its two loads
#define PAIRS_MAX 128   // headDim ≤ 256

/** Where a lane's pairs lie: two runs of elements. */
struct Runs {
  /** The runs have the pairs' first and second elements; else pairs are neighbours. */
  bool apart;
  int first, second;

  /** Of the pairs from `p` on, of which none or all turn. */
  __device__ __forceinline__ Runs(const Rope& rope, int p) {
    int2 at = pairOf(rope, p);
    apart = at.y != at.x + 1;
    first = at.x, second = apart ? at.y : at.x + RUN;
  }
};

/** Runs of elements as pairs: first elements in a, second ones in b. */
__device__ __forceinline__ void pairUp(bool apart, float* a, float* b) {
  if (apart) return;
  float x[RUN], y[RUN];
#pragma unroll
  for (int i = 0; i < RUN / 2; i++) {
    x[i] = a[2 * i], y[i] = a[2 * i + 1];
    x[RUN / 2 + i] = b[2 * i], y[RUN / 2 + i] = b[2 * i + 1];
  }
#pragma unroll
  for (int i = 0; i < RUN; i++) a[i] = x[i], b[i] = y[i];
}

/** Pairs as runs of elements again. */
__device__ __forceinline__ void lineUp(bool apart, float* a, float* b) {
  if (apart) return;
  float x[RUN], y[RUN];
#pragma unroll
  for (int i = 0; i < RUN / 2; i++) {
    x[2 * i] = a[i], x[2 * i + 1] = b[i];
    y[2 * i] = a[RUN / 2 + i], y[2 * i + 1] = b[RUN / 2 + i];
  }
#pragma unroll
  for (int i = 0; i < RUN; i++) a[i] = x[i], b[i] = y[i];
}

/**
 * RMS norm over a head, which `lanes` neighbours have (a power of two; some may have nothing).
 * Rounds as a norm of its own would.
 */
__device__ __forceinline__ void normHead(float* x, float* y, const Runs& at, const float* weight,
                                         int headDim, float eps, int lanes, bool some) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < RUN; i++) sum += x[i] * x[i] + y[i] * y[i];
  u32 group = lanes == 32 ? ~0u : ((1u << lanes) - 1) << (threadIdx.x & 31 & -lanes);
  for (int by = lanes >> 1; by; by >>= 1) sum += __shfl_xor_sync(group, sum, by);
  if (!some) return;
  float scale = rsqrtf(sum / headDim + eps);
#pragma unroll
  for (int i = 0; i < RUN; i++) {
    x[i] = rounded(x[i] * scale * weight[at.first + i]);
    y[i] = rounded(y[i] * scale * weight[at.second + i]);
  }
}

/**
 * q, k, v: rows `stride` elements apart; a null q or k is left out. qOut: [rows, heads·headDim].
 * qNorm, kNorm: null for none. layerOffset: bytes from a token's start to the layer's keys, behind
 * which its values lie. headDim and dimensions that turn: multiples of 16.
 */
template <bool SCALED>
__device__ __forceinline__ void append(const bf16* q, const bf16* k, const bf16* v, int qStride,
                                       int kvStride, bf16* qOut, const int* positions,
                                       const u64* slots, const Rope& rope, const float* qNorm,
                                       const float* kNorm, float eps, int heads, int kvHeads,
                                       int headDim, u64 tokenStride, u64 layerOffset,
                                       Scales scales) {
  __shared__ __align__(16) float2 turns[PAIRS_MAX];
  awaitInputs();
  releaseDependents();
  int row = blockIdx.x;
  int position = positions[row];
  u64 slot = slots[row];
  // A row that pads the batch has no sequence: it writes nowhere.
  if (slot == 0) return;
  float token = SCALED ? widen(scales.tokens[row]) : 1.f;
  for (int p = threadIdx.x; p < headDim >> 1; p += blockDim.x) turns[p] = turnOf(rope, p, position);
  __syncthreads();
  bf16* place = (bf16*)(slot + position * tokenStride + layerOffset);
  int queries = q ? heads : 0, all = queries + (k ? 2 * kvHeads : 0);
  int lanes = 1;
  while (lanes * 2 * RUN < headDim) lanes *= 2;
  int pair = threadIdx.x % lanes * RUN;
  bool some = pair < headDim >> 1;
  Runs at(rope, some ? pair : 0);
  int step = gridDim.y * blockDim.x / lanes;
  for (int h = (blockIdx.y * blockDim.x + threadIdx.x) / lanes; h < all; h += step) {
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
    float x[RUN] = {}, y[RUN] = {};
    if (some) {
      uint4 first = *(const uint4*)(from + at.first), second = *(const uint4*)(from + at.second);
      unpack8(first, x), unpack8(second, y);
      if (SCALED) {
        const bf16* rows = scales.rows + h * headDim;
        scale8(x, *(const uint4*)(rows + at.first), token);
        scale8(y, *(const uint4*)(rows + at.second), token);
      }
    }
    const float* weight = kind == 0 ? qNorm : kind == 1 ? kNorm : nullptr;
    if (weight) normHead(x, y, at, weight, headDim, eps, lanes, some);
    if (!some) continue;
    if (kind != 2) {
      pairUp(at.apart, x, y);
#pragma unroll
      for (int i = 0; i < RUN; i++) turn(turns[pair + i], x[i], y[i]);
      lineUp(at.apart, x, y);
    }
    *(uint4*)(to + at.first) = pack8(x);
    *(uint4*)(to + at.second) = pack8(y);
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
