// Owns products of e4m3 in a decode step of many tokens: weights become bf16 in registers, on their
// way from the ring to the tensor cores; tokens are bf16 as in gemv.cu, more exact than 8 bits, and
// nobody has to know their largest element. A page has twice as many elements as one of bf16.
//
// ldmatrix gives a lane four neighbours of a row, and products want two, and two of eight further
// on: so tokens' elements lie in another order (evens.cuh), which whoever writes them sees to.
#pragma once
#include "batch-phases.cuh"
#include "evens.cuh"

/** Bytes of the scales of a round's rows. */
constexpr int SCALES_BYTES = E4M3 ? ROUND_GROUPS * 32 : 0;

/** What sums are to be multiplied by besides scales: 2^120 of weights, less that of tokens. */
constexpr float SUMS_FACTOR = 72057594037927936.f;  // 2^56

/**
 * Of four numbers those at even places and those at odd ones, as pairs of bf16: their bits are
 * moved to where bf16 has them, which is 2^-120 of the number, subnormal or not.
 */
__device__ __forceinline__ void widen(u32 x, u32 &even, u32 &odd) {
  constexpr u32 SIGN = 0x80008000, REST = 0x07f007f0;
  even = (x << 8 & SIGN) | (x << 4 & REST);
  odd = (x & SIGN) | (x >> 4 & REST);
}

/** Half a page of a warp's 16 rows; `from` is the lane's. */
struct Half {
  u32 x[2][4];

  __device__ __forceinline__ void load(u32 from, int half) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      loadMatrices(x[i], from + ((half * 4 + i * 2 + lane / 16) ^ lane % 8) * 16);
    }
  }
  /** The operand of product k of four. */
  __device__ __forceinline__ void widen(u32 (&a)[4], int k) const {
    ::widen(x[k / 2][k % 2 * 2], a[0], a[2]);
    ::widen(x[k / 2][k % 2 * 2 + 1], a[1], a[3]);
  }
};

/**
 * As multiplySteps (batch-products.cuh), of weights of e4m3. While half a page is multiplied, the
 * next is widened; pages of weights are free as soon as they are in registers.
 * begun: called once the first tokens are there
 */
template <bool TWO, typename Begun>
__device__ __forceinline__ void multiplyNarrow(const Ring &ring, Place &at, const Share &share,
                                               int pages, float (&d)[2][TOKENS / 2], Begun begun) {
  constexpr int HALVES = TWO ? 4 : 2;
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int row = (threadIdx.x % 128 / 32 * 16 + lane % 16) * 128;
  const int own[2] = {min(warpgroup, pages), min(warpgroup + 2, pages)};
  u32 a[2][4][4];
  Half raw;
  auto load = [&](const Place &step, int part) {
    raw.load(ring.at(step.after(own[part / 2])) + row, part % 2);
  };
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i++) d[0][i] = d[1][i] = 0.f;
  awaitPages(ring, at, pages + 2);
  load(at, 0);
  begun();
#pragma unroll
  for (int k = 0; k < 4; k++) raw.widen(a[0][k], k);
  for (int step = share.firstStep; step < share.endStep; step++) {
    const Place inputs = at.after(pages), next = at.after(pages + 2);
#pragma unroll
    for (int part = 0; part < HALVES; part++) {
      if (part + 1 < HALVES) {
        load(at, part + 1);
      } else {
        release(ring, at, pages);
        if (step + 1 < share.endStep) {
          awaitPages(ring, next, pages + 2);
          load(next, 0);
        }
      }
      const u64 right = descriptor(ring.at(inputs.after(part % 2)), 16);
      productsBegin();
#pragma unroll
      for (int k = 0; k < 4; k++) {
        productHalf(d[part / 2], a[part % 2][k], advanced(right, k * 32));
        // A warp waits until its product has begun. After the last step this is of no use.
        raw.widen(a[(part + 1) % 2][k], k);
      }
      productsCommit();
      productsWait<0>();
    }
    release(ring, inputs, 2);
    at = next;
  }
  settle(d[0]);
  if (TWO) settle(d[1]);
}

/** Asks for the scales of a round's rows: 8 rows, then their 8 partners. By all that multiply. */
__device__ __forceinline__ void fetchScales(const Phase &p, bf16 *to, int group, int groups) {
  if (threadIdx.x >= 2 * groups) return;
  const int half = threadIdx.x % 2;
  group += threadIdx.x / 2;
  int row = group * 16 + half * 8;
  if (p.kind == GLU) row = (group + half * p.groups) * 8;
  else if (p.kind == ROPE) row = (group + (group / p.headGroups + half) * p.headGroups) * 8;
  copy16(address(to + threadIdx.x * 8), p.scales + row);
  if (p.kind == ADD) asm volatile("prefetch.global.L2 [%0];" ::"l"(p.norm + row));
}
