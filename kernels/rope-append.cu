// Owns the step from a row of projections to attention's inputs: each head of q and k is normed
// (if its family does that) and rotated, q goes to rows of its own, k and v to the token's place
// in its slot. One warp a head of a token. Reads 2·(heads + 2·kvHeads)·headDim bytes a
// token and writes as many: 24 KiB for an 8B model, 64 tokens 1.6 MB, launch-bound (2–3 µs). One
// rounding (two with a head norm). Oracle: test/cuda/rope.gpu.ts.
#include "rope.cuh"

#define PAIRS 4  // of a lane: headDim ≤ 256

/** RMS norm over a head, in a warp; weights by element. Rounds as a norm of its own would. */
__device__ __forceinline__ void normHead(float (*v)[2], const float* weight, const Rope& rope,
                                         int headDim, float eps, int lane) {
  float sum = 0.f;
  for (int c = 0; c < PAIRS; c++) sum += v[c][0] * v[c][0] + v[c][1] * v[c][1];
  float scale = rsqrtf(warpSum(sum) / headDim + eps);
  for (int c = 0; c < PAIRS; c++) {
    int p = lane + 32 * c;
    if (p >= headDim >> 1) break;
    int2 at = pairOf(rope, p);
    v[c][0] = rounded(v[c][0] * scale * weight[at.x]);
    v[c][1] = rounded(v[c][1] * scale * weight[at.y]);
  }
}

/**
 * q, k, v: rows `stride` elements apart; a null q or k is left out. qOut: [rows, heads·headDim].
 * qNorm, kNorm: null for none. layerOffset: bytes from a token's start to the layer's keys, behind
 * which its values lie.
 */
extern "C" __global__ void ropeAppend(const bf16* q, const bf16* k, const bf16* v, int qStride,
                                      int kvStride, bf16* qOut, const int* positions,
                                      const u64* slots, const float* frequencies, int dimensions,
                                      int interleaved, float magnitude, const float* qNorm,
                                      const float* kNorm, float eps, int heads, int kvHeads,
                                      int headDim, u64 tokenStride, u64 layerOffset) {
  Rope rope = {frequencies, dimensions, interleaved, magnitude};
  awaitInputs();
  releaseDependents();
  int row = blockIdx.x, lane = threadIdx.x & 31;
  int position = positions[row];
  u64 slot = slots[row];
  // A row that pads the batch has no sequence: it writes nowhere.
  if (slot == 0) return;
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
    float x[PAIRS][2] = {};
    for (int c = 0; c < PAIRS; c++) {
      int p = lane + 32 * c;
      if (p >= headDim >> 1) break;
      int2 at = pairOf(rope, p);
      x[c][0] = widen(from[at.x]);
      x[c][1] = widen(from[at.y]);
    }
    const float* weight = kind == 0 ? qNorm : kind == 1 ? kNorm : nullptr;
    if (weight) normHead(x, weight, rope, headDim, eps, lane);
    for (int c = 0; c < PAIRS; c++) {
      int p = lane + 32 * c;
      if (p >= headDim >> 1) break;
      if (kind != 2) rotate(rope, p, position, x[c][0], x[c][1]);
      int2 at = pairOf(rope, p);
      to[at.x] = narrow(x[c][0]);
      to[at.y] = narrow(x[c][1]);
    }
  }
}
