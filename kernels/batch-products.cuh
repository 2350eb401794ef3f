// Owns the products of a decode step of many tokens: sums of a tile by warpgroups, their exchange
// between the blocks that share its K, and what comes after: norm, sum, activation or rotation.
//
// A warpgroup has 64 rows of a page, a warp 16 of these, a group: the fragment that a lane holds
// has row lane / 4 and its partner for tokens 8·i + lane % 4 · 2 and one more. Nothing has to go
// through shared memory, but for 8 × 8 transpositions between lanes so that stores lie together.
//
// Blocks hand each other sums through L2 without a signal: a sum's last bit says whose turn it is,
// and who wants it looks until that bit has changed. (2^-24 of a part of a sum is lost.)
#pragma once
#include "batch-attention.cuh"
#include "batch-e4m3.cuh"

constexpr int FRAGMENTS = TOKENS / 8;
constexpr int SPLIT = 4;  // blocks that share a tile, if any do

/** What a block's products need besides the table. */
struct Products {
  u32 step;
  int tokens;
  const int *positions;
  const u64 *slots;
  u64 tokenStride;
  /** [tile, block of it, part of a sum, thread] */
  uint4 *exchange;
  /** [tile, TOKENS] */
  float *squares;
  /** [TOKENS, pairs of a head]: cosine and sine. */
  const float2 *turns;
  /** In shared memory: what attention has in other phases; [warp, TOKENS]; [TOKENS]. */
  float *area, *warpSquares, *scales;
  /** Of a round's rows in their groups, in shared memory; see fetchScales. */
  bf16 *rowScales;
};

__device__ __forceinline__ void give(uint4 *to, const float *v, u32 turn) {
  u32 x[4];
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = (__float_as_uint(v[i]) & ~1u) | turn;
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

__device__ __forceinline__ uint4 look(const uint4 *from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
  return v;
}

/** Of what was looked at last, whether it is all of this turn. */
__device__ __forceinline__ bool isThere(uint4 v, u32 turn) {
  return (((v.x ^ turn) | (v.y ^ turn) | (v.z ^ turn) | (v.w ^ turn)) & 1) == 0;
}

/** Asks for sums of squares of tokens' rows so far, by tile. By all that multiply. */
__device__ __forceinline__ void fetchSquares(const Phase &p, const Products &a) {
  for (int i = threadIdx.x * 4; i < p.squares * TOKENS; i += CONSUMERS * 4) {
    copy16(address(a.area + i), a.squares + i);
  }
}

/** What each token's products are multiplied by; for all threads that multiply. */
__device__ __forceinline__ void computeScales(const Phase &p, const Products &a) {
  constexpr int PARTS = CONSUMERS / TOKENS;
  asm volatile("cp.async.wait_all;" ::: "memory");
  meet();
  if (threadIdx.x < TOKENS) {
    float sum = 0.f, parts[PARTS] = {};
    for (int first = 0; first < p.squares; first += PARTS) {
#pragma unroll
      for (int i = 0; i < PARTS; i++) {
        if (first + i < p.squares) parts[i] += a.area[(first + i) * TOKENS + threadIdx.x];
      }
    }
#pragma unroll
    for (int i = 0; i < PARTS; i++) sum += parts[i];
    a.scales[threadIdx.x] = p.squares > 0 ? rsqrtf(sum / p.k + p.eps) : 1.f;
  }
  meet();
}

/** A fragment: tokens t and t + 1 of row lane / 4, and of its partner. */
struct Piece16 {
  /** The group, the first of 8 tokens. */
  int group, first;

  __device__ __forceinline__ int token() const { return first + threadIdx.x % 4 * 2; }
  __device__ __forceinline__ int row() const { return threadIdx.x % 32 / 4; }
  /** After a transposition: which token, and the first of two rows among 8. */
  __device__ __forceinline__ int ownToken() const { return first + threadIdx.x % 32 / 4; }
  __device__ __forceinline__ int ownRow() const { return threadIdx.x % 4 * 2; }
};

/** What the end of a fragment needs, asked for early. */
struct Ahead {
  /** ADD: two old values, transposed, and the next norm's weights; ROPE: turns of both tokens. */
  float word[4];
  /** ROPE: where the token's keys are, or 0. */
  u64 keys;

  template <int KIND>
  __device__ __forceinline__ void load(const Phase &p, const Products &a, const Piece16 &at) {
    const bool real = at.ownToken() < a.tokens;
    if (KIND == ADD) {
      const bf16 *row = (const bf16 *)p.out + (u64)at.ownToken() * p.outStride + at.group * 16 +
                        at.ownRow();
      const float *weight = p.norm + at.group * 16 + at.row();
      word[0] = __uint_as_float(real ? freshWord(row) : 0);
      word[1] = __uint_as_float(real ? freshWord(row + 8) : 0);
      word[2] = __ldg(weight), word[3] = __ldg(weight + 8);
    } else if (KIND == ROPE) {
      const int pairs = p.headGroups * 8, pair = at.group % p.headGroups * 8 + at.row();
      const float2 x = freshPair(a.turns + at.token() * pairs + pair);
      const float2 y = freshPair(a.turns + (at.token() + 1) * pairs + pair);
      word[0] = x.x, word[1] = x.y, word[2] = y.x, word[3] = y.y;
      keys = real ? a.slots[at.ownToken()] : 0;
      if (keys) keys += a.positions[at.ownToken()] * a.tokenStride + p.layerOffset;
    }
  }
};

__device__ __forceinline__ void storePair(bf16 *to, u32 x, bool real) {
  const u32 mine = transpose(x);
  if (real) *(u32 *)to = mine;
}

/** The same for an input of e4m3's products: `to` is the 16 that it is the first or second 8 of. */
__device__ __forceinline__ void storeEvens(bf16 *to, int half, u32 x, bool real) {
  const u32 mine = evensApart(transpose(x));
  if (real) *((u32 *)to + half * 2 + evensPlace()) = mine;
}

/** @param squares of the two tokens, added to */
__device__ __forceinline__ void finishAdd(const Phase &p, const Products &a, const Piece16 &at,
                                          const float (&v)[4], const Ahead &ahead,
                                          float (&squares)[2]) {
  const bool real = at.ownToken() < a.tokens;
  const u64 place = (u64)at.ownToken() * p.outStride + at.group * 16 + at.ownRow();
  bf16 *const next = p.next + inputPlace(at.ownToken(), at.group * 16);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const u32 old = transpose(__float_as_uint(ahead.word[half]));
    const u32 sum = pack(v[2 * half] + low(old), v[2 * half + 1] + high(old));
    const float x = low(sum), y = high(sum), weight = ahead.word[2 + half];
    squares[0] += x * x, squares[1] += y * y;
    storePair((bf16 *)p.out + place + half * 8, sum, real);
    if (E4M3 && p.evens) {
      const float more = weight * EVENS_FACTOR;
      storeEvens(next, half, pack(x * more, y * more), real);
    } else {
      storePair(next + at.ownRow() + half * 8, pack(x * weight, y * weight), real);
    }
  }
}

__device__ __forceinline__ void finishGlu(const Phase &p, const Products &a, const Piece16 &at,
                                          const float (&v)[4]) {
  constexpr float FACTOR = E4M3 ? EVENS_FACTOR : 1.f;
  const u32 y = pack(activate(rounded(v[0]), p.gelu) * rounded(v[2]) * FACTOR,
                     activate(rounded(v[1]), p.gelu) * rounded(v[3]) * FACTOR);
  const bool real = at.ownToken() < a.tokens;
  if (E4M3) {
    bf16 *to = (bf16 *)p.out + inputPlace(at.ownToken(), at.group / 2 * 16);
    storeEvens(to, at.group % 2, y, real);
  } else {
    storePair((bf16 *)p.out + inputPlace(at.ownToken(), at.group * 8 + at.ownRow()), y, real);
  }
}

__device__ __forceinline__ void finishRope(const Phase &p, const Products &a, const Piece16 &at,
                                           const float (&v)[4], const Ahead &ahead) {
  const int head = at.group / p.headGroups, half = p.headGroups * 8;
  const bool turns = head < HEADS + KV_HEADS;
  float x[2], y[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float left = rounded(v[i]), right = rounded(v[2 + i]);
    const float cosine = turns ? ahead.word[2 * i] : 1.f;
    const float sine = turns ? ahead.word[2 * i + 1] : 0.f;
    x[i] = left * cosine - right * sine, y[i] = left * sine + right * cosine;
  }
  // K and V of a token lie one behind the other, as their rows do in W.
  bf16 *to = head < HEADS ? (bf16 *)p.out + (u64)at.ownToken() * p.outStride
                          : (bf16 *)ahead.keys - HEADS * half * 2;
  to += head * half * 2 + at.group % p.headGroups * 8 + at.ownRow();
  storePair(to, pack(x[0], x[1]), ahead.keys != 0);
  storePair(to + half, pack(y[0], y[1]), ahead.keys != 0);
}

__device__ __forceinline__ void finishLogits(const Phase &p, const Products &a, const Piece16 &at,
                                             const float (&v)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int token = at.token() + i % 2;
    float *to = (float *)p.out + (u64)token * p.outStride + at.group * 16 + i / 2 * 8 + at.row();
    if (token < a.tokens) *to = v[i];
  }
}

/** Where a block's part of a product ends: its tile, the round's first group, its pages. */
struct End {
  const Share &share;
  int group, pages;

  /** Of a warpgroup's first and second page. */
  __device__ __forceinline__ int page(int j) const { return threadIdx.x / 128 + 2 * j; }
  __device__ __forceinline__ int groupOf(int j) const {
    return group + page(j) * PAGE_GROUPS + threadIdx.x % 128 / 32;
  }
  __device__ __forceinline__ bool real(int j) const {
    return page(j) < pages && groupOf(j) < share.to;
  }
};

struct Scaled {
  float x[4];

  __device__ __forceinline__ Scaled(const Products &a, const Piece16 &at, const float *sums) {
    const float2 scale = *(const float2 *)(a.scales + at.token());
    x[0] = sums[0] * scale.x, x[1] = sums[1] * scale.y;
    x[2] = sums[2] * scale.x, x[3] = sums[3] * scale.y;
  }
};

/** What sums of products of e4m3 are multiplied by, in the fragments of a page. */
struct RowScales {
  float row = 1.f, partner = 1.f;

  __device__ __forceinline__ RowScales(const Products &a, const End &end, int j) {
    if (!E4M3) return;
    const bf16 *at = a.rowScales + (end.groupOf(j) - end.group) * 16 + threadIdx.x % 32 / 4;
    row = widen(at[0]) * SUMS_FACTOR, partner = widen(at[8]) * SUMS_FACTOR;
  }
  __device__ __forceinline__ void apply(float (&v)[4]) const {
    if (E4M3) v[0] *= row, v[1] *= row, v[2] *= partner, v[3] *= partner;
  }
};

/** The end of a tile whose sums `d` [page of two, fragment, 4] this block has alone. */
template <int KIND>
__device__ __forceinline__ void finishWhole(const Phase &phase, const Products &a, const End &end,
                                            const float (&d)[2][FRAGMENTS * 4]) {
  const Phase &p = phase;
#pragma unroll 1
  for (int j = 0; j < 2; j++) {
    if (!end.real(j)) continue;
    const RowScales rows(a, end, j);
#pragma unroll
    for (int u = 0; u < FRAGMENTS; u++) {
      const Piece16 at = {end.groupOf(j), u * 8};
      float sums[4];
#pragma unroll
      for (int i = 0; i < 4; i++) sums[i] = j ? d[1][u * 4 + i] : d[0][u * 4 + i];
      if (KIND == GLU) rows.apply(sums);
      const Scaled y(a, at, sums);
      if (KIND == GLU) finishGlu(p, a, at, y.x);
      else finishLogits(p, a, at, y.x);
    }
  }
}

/** Of whole rows: the squares of this block's tokens, over its warps. By all its threads. */
__device__ __forceinline__ void addSquares(const Products &a, int tile, int first, int count) {
  meet();
  const int thread = threadIdx.x;
  if (thread >= count) return;
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < CONSUMERS / 32; w++) sum += a.warpSquares[w * TOKENS + thread];
  a.squares[tile * TOKENS + first + thread] = sum;
}

/**
 * The end of a tile that SPLIT blocks share: this block's sums meet those of the others; of each
 * warp's group it finishes an equal share of the fragments.
 */
template <int KIND>
__device__ __forceinline__ void finishShared(const Phase &phase, const Products &a, const End &end,
                                             const float (&d)[2][FRAGMENTS * 4]) {
  // What it adds up itself a block keeps, unless that would need registers that it has not.
  constexpr bool KEEP = !E4M3;
  constexpr int OWN = FRAGMENTS / SPLIT, ROUNDS = KIND == ADD ? 1 : 2;
  const Phase &p = phase;
  const int thread = threadIdx.x, peer = end.share.peer;
  constexpr int OF_PEER = 2 * FRAGMENTS * CONSUMERS;
  const u32 turn[2] = {(p.turns ^ (p.turns >> 1 & a.step)) & 1,
                       (p.turns >> 2 ^ (p.turns >> 3 & a.step)) & 1};
  uint4 *const sums = a.exchange + (u64)end.share.tile * SPLIT * OF_PEER + thread;
  uint4 *const given = sums + peer * OF_PEER, *const taken = sums + peer * OWN * CONSUMERS;
#pragma unroll
  for (int j = 0; j < ROUNDS; j++) {
    if (j > 0 && end.page(j) >= end.pages) continue;
#pragma unroll
    for (int i = 0; i < FRAGMENTS; i++) {
      if (KEEP && i / OWN == peer) continue;
      give(given + (j * FRAGMENTS + i) * CONSUMERS, d[j] + i * 4, turn[j]);
    }
  }
  // While the others' sums are on their way.
  computeScales(p, a);
  float own[ROUNDS][OWN][4];
#pragma unroll
  for (int j = 0; j < ROUNDS; j++) {
#pragma unroll
    for (int i = 0; i < FRAGMENTS; i++) {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        own[j][i % OWN][k] = i < OWN || i / OWN == peer ? d[j][i * 4 + k] : own[j][i % OWN][k];
      }
    }
  }
  float squares[OWN][2] = {};
#pragma unroll
  for (int j = 0; j < ROUNDS; j++) {
    if (j > 0 && end.page(j) >= end.pages) continue;
    Ahead ahead[OWN];
#pragma unroll
    for (int u = 0; u < OWN; u++) {
      if (end.real(j)) ahead[u].load<KIND>(p, a, {end.groupOf(j), (peer * OWN + u) * 8});
    }
    auto source = [&](int r, int u) {
      return taken + r * OF_PEER + (j * FRAGMENTS + u) * CONSUMERS;
    };
    uint4 seen[SPLIT][OWN];
    bool all = false;
    for (u32 spins = 0; !all; spins++) {
      all = true;
#pragma unroll
      for (int r = 0; r < SPLIT; r++) {
#pragma unroll
        for (int u = 0; u < OWN; u++) {
          if (!KEEP || r != peer) seen[r][u] = look(source(r, u));
        }
      }
#pragma unroll
      for (int r = 0; r < SPLIT; r++) {
#pragma unroll
        for (int u = 0; u < OWN; u++) {
          all = ((KEEP && r == peer) || isThere(seen[r][u], turn[j])) && all;
        }
      }
      if (spins == SPINS_MAX) __trap();
    }
    const RowScales rows(a, end, j);
#pragma unroll
    for (int u = 0; u < OWN; u++) {
      // In the order of their parts of K.
      float sum[4] = {};
#pragma unroll
      for (int r = 0; r < SPLIT; r++) {
        const bool mine = KEEP && r == peer;
        sum[0] += mine ? own[j][u][0] : __uint_as_float(seen[r][u].x);
        sum[1] += mine ? own[j][u][1] : __uint_as_float(seen[r][u].y);
        sum[2] += mine ? own[j][u][2] : __uint_as_float(seen[r][u].z);
        sum[3] += mine ? own[j][u][3] : __uint_as_float(seen[r][u].w);
      }
      if (!end.real(j)) continue;
      rows.apply(sum);
      const Piece16 at = {end.groupOf(j), (peer * OWN + u) * 8};
      if (KIND == ADD) finishAdd(p, a, at, sum, ahead[u], squares[u]);
      else finishRope(p, a, at, Scaled(a, at, sum).x, ahead[u]);
    }
  }
  if (KIND != ADD) return;
#pragma unroll
  for (int u = 0; u < OWN; u++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int by = 4; by < 32; by *= 2) {
        squares[u][i] += __shfl_xor_sync(~0u, squares[u][i], by);
      }
      if (thread % 32 < 4) {
        a.warpSquares[thread / 32 * TOKENS + u * 8 + thread % 4 * 2 + i] = squares[u][i];
      }
    }
  }
  addSquares(a, end.share.tile, peer * OWN * 8, OWN * 8);
}

/**
 * Sums of a tile's share of K. A warpgroup's first page is that of its number, its second, if TWO,
 * two further on; what it has no page for it computes of something else, and nobody looks.
 */
template <bool TWO>
__device__ __forceinline__ void multiplySteps(const Phase &p, const Products &a, const Ring &ring,
                                              Place &at, const Share &share, bool scales,
                                              int pages, float (&d)[2][FRAGMENTS * 4]) {
  const int warpgroup = threadIdx.x / 128;
  const int own = min(warpgroup, pages);
#pragma unroll
  for (int i = 0; i < FRAGMENTS * 4; i++) d[0][i] = d[1][i] = 0.f;
  Place last = at;
  for (int step = share.firstStep; step < share.endStep; step++) {
    const Place x = at.after(pages), first = at.after(own);
    const Place second = at.after(min(warpgroup + 2, pages));
    awaitPages(ring, at, pages + 1);
    productsBegin();
#pragma unroll
    for (int k = 0; k < STEP / 16; k++) {
      const u64 right = descriptor(ring.at(x) + k * 32, 16);
      productShared(d[0], descriptor(ring.at(first) + k * 32, 16), right, 1);
      if (TWO) productShared(d[1], descriptor(ring.at(second) + k * 32, 16), right, 1);
    }
    productsCommit();
    // The products of the step before are done: its pages are free.
    productsWait<1>();
    if (step > share.firstStep) release(ring, last, pages + 1);
    else if (scales) fetchSquares(p, a);
    last = at;
    at.advance(pages + 1);
  }
  productsWait<0>();
  release(ring, last, pages + 1);
  settle(d[0]);
  if (TWO) settle(d[1]);
}

/** This block's part of a product; `at` moves on by its pages. */
__device__ __forceinline__ void multiplyShare(const Phase &p, const Products &a, const Ring &ring,
                                              Place &at) {
  const Share share(p);
  for (int group = share.from; group < share.to; group += ROUND_GROUPS) {
    const int groups = min(ROUND_GROUPS, share.to - group);
    const int pages = (groups + PAGE_GROUPS - 1) / PAGE_GROUPS;
    const bool scales = p.squares > 0 && group == share.from;
    float d[2][FRAGMENTS * 4];
    const bool two = threadIdx.x / 128 + 2 < pages;
    if (p.narrow()) {
      if (group > share.from) meet();
      fetchScales(p, a.rowScales, group, groups);
      auto begun = [&] {
        if (scales) fetchSquares(p, a);
      };
      if (two) multiplyNarrow<true>(ring, at, share, pages, d, begun);
      else multiplyNarrow<false>(ring, at, share, pages, d, begun);
    } else if (two) {
      multiplySteps<true>(p, a, ring, at, share, scales, pages, d);
    } else {
      multiplySteps<false>(p, a, ring, at, share, scales, pages, d);
    }
    // Before a tile that is shared is finished, what it is made of is handed on.
    const bool shared = p.kind == ADD || p.kind == ROPE;
    if (!shared && (group == share.from || p.narrow())) computeScales(p, a);
    const End end = {share, group, pages};
    if (p.kind == ADD) finishShared<ADD>(p, a, end, d);
    else if (p.kind == ROPE) finishShared<ROPE>(p, a, end, d);
    else if (p.kind == GLU) finishWhole<GLU>(p, a, end, d);
    else finishWhole<LOGITS>(p, a, end, d);
  }
}
