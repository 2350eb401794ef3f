// Owns the table that a decode step of many tokens follows, which block has which share of a phase,
// the ring of shared memory that everything a block reads comes through, and how blocks tell each
// other that a phase is done.
//
// Before: -D TOKENS PAGES [E4M3 1]
#pragma once
#include "rope.cuh"
#include "signals.cuh"
#include "wgmma.cuh"

#define ADD 1        // out[t][row] += y, bf16; then times the next norm's weights into `next`
#define GLU 2        // rows are [gate | up]: out[t][i] = act(gate[i])·up[i], bf16
#define LOGITS 3     // out[t][row] = y, float32
#define ROPE 4       // rows are [q | k | v]: q is rotated into out, k too and v into the slot
#define ATTENTION 5  // of the queries `q`, over each token's slot; no weights

#ifndef E4M3
#define E4M3 0  // weights are of 8 bits, but for those of the logits
#endif
constexpr int STEP = 64;  // elements of K in a page of bf16
constexpr int PAGE = 64 * STEP * 2;
constexpr int INPUT_BYTES = TOKENS * STEP * 2;
/** Of 16 rows each: 8 and their partners (gate and up, halves of a head), or 16 neighbours. */
constexpr int PAGE_GROUPS = 4, ROUND_GROUPS = 16;
constexpr int GROUP_BYTES = PAGE / PAGE_GROUPS;
/** More than a step has. */
constexpr u32 PHASES_MAX = 1 << 12;
constexpr int CONSUMERS = 256, THREADS = CONSUMERS + 64;

static_assert(TOKENS == 32 || TOKENS == 64, "tokens of a step are a page at most");

/** As src/backends/cuda/batch-table.ts writes it. */
struct __align__(16) Phase {
  /**
   * Weights as [heads, groups, 2, 8, k] in boxes of four groups, and of one; the input. ATTENTION:
   * keys and values in boxes of a tile, and of 16 tokens twice.
   */
  const TensorMap *four, *one, *in;
  /** ATTENTION, GLU: as `inputPlace` says. */
  void *out;
  /** ADD: the next product's input, as `inputPlace` says; float32 weights by row that are in it. */
  bf16 *next;
  const float *norm;
  union {
    /** ATTENTION */
    const bf16 *q;
    /** Products of e4m3: of each row of the matrix. */
    const bf16 *scales;
  };
  /** ROPE: bytes from a token's start to the layer's keys. */
  u64 layerOffset;
  /** Groups and steps of K of the matrix; tiles of groups, and blocks that share a tile's K. */
  int kind, groups, steps, tiles, split;
  /** ROPE: groups of a head; 0 otherwise. */
  int headGroups;
  int outStride, gelu;
  /** Blocks that signal the phase before this one. */
  u32 arrivals;
  /** Partial sums of squares by which tokens are normed after the product; 0: they are not. */
  int squares;
  int k;
  float eps;
  /** ATTENTION: tokens that a query sees, itself included; the layer's first row of keys. */
  int window, headRow;
  /**
   * Where sums are handed on, for first and second pages two bits each: how often in a step before
   * this, and how often in a whole step, both as the last bit of that number.
   */
  u32 turns;
  /** ADD: the next product is of e4m3, whose input lies as evens.cuh says. */
  int evens;

  __device__ __forceinline__ bool narrow() const { return E4M3 && kind != LOGITS; }
  /** Pages of tokens beside those of weights in a step of K. */
  __device__ __forceinline__ int inputs() const { return narrow() ? 2 : 1; }
};
static_assert(sizeof(Phase) == 128, "the host writes phases");

/**
 * Where an element of a product's input lies: as [K / 64, TOKENS, 64]. A page of it, which many
 * blocks read at about the same time, is one piece of memory.
 */
__device__ __forceinline__ int inputPlace(int token, int k) {
  return (k / STEP * TOKENS + token) * STEP + k % STEP;
}

/** What a block does of a product: groups of a tile, in rounds, and steps of K. */
struct Share {
  int tile, peer, from, to, firstStep, endStep;
  bool some;

  __device__ __forceinline__ explicit Share(const Phase &p) {
    tile = blockIdx.x / p.split, peer = blockIdx.x % p.split;
    some = tile < p.tiles;
    from = p.groups * tile / p.tiles;
    to = some ? p.groups * (tile + 1) / p.tiles : from;
    firstStep = p.steps * peer / p.split;
    endStep = p.steps * (peer + 1) / p.split;
  }
};

/** A step's counters: by phase, how many blocks have done their part in all steps so far. */
struct Counters {
  /** Steps so far, blocks that have ended this launch, two unused words, and the phases'. */
  u32 *all;
  u32 step;

  /** After `awaitInputs`. */
  __device__ __forceinline__ explicit Counters(u32 *all) : all(all), step(*(volatile u32 *)all) {}
  __device__ __forceinline__ u32 *of(int phase) const { return all + 4 + phase; }

  /**
   * By one thread: until phase `p` is done everywhere. All blocks run at once (the launch is
   * cooperative), so this ends; if it should not within seconds, the kernel fails.
   */
  __device__ __forceinline__ void await(int p, u32 arrivals) const {
    const u32 wanted = (step + 1) * arrivals;
    for (u32 spins = 0; (int)(acquire(of(p)) - wanted) < 0; spins++) {
      if (spins == SPINS_MAX) __trap();
    }
    seeForCopies();
  }
};

/** A place in the ring, and which turn it is there. */
struct Place {
  int page = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance(int pages) {
    page += pages;
    if (page >= PAGES) page -= PAGES, parity ^= 1;
  }
  __device__ __forceinline__ void advanceFar(int pages) {
    parity ^= pages / PAGES & 1;
    advance(pages % PAGES);
  }
  __device__ __forceinline__ Place after(int pages) const {
    Place place = *this;
    place.advance(pages);
    return place;
  }
};

/** PAGES pages, each with a barrier for when it is full and one for when it is empty. */
struct Ring {
  u32 pages, full, empty;

  __device__ __forceinline__ u32 at(const Place &p) const { return pages + p.page * PAGE; }
  __device__ __forceinline__ u32 fullOf(const Place &p) const { return full + p.page * 8; }
  __device__ __forceinline__ u32 emptyOf(const Place &p) const { return empty + p.page * 8; }
  __device__ __forceinline__ void awaitFull(const Place &p) const {
    barrierWait(fullOf(p), p.parity);
  }
  __device__ __forceinline__ void awaitEmpty(const Place &p) const {
    barrierWait(emptyOf(p), p.parity ^ 1);
  }
};

/**
 * A warp waits for `count` pages from `place` on. In a product every warp waits for every page, and
 * releases it, whether it has a use for it or not: one that ran ahead by a turn of the ring would
 * take a page of the turn before that for its own.
 */
__device__ __forceinline__ void awaitPages(const Ring &ring, const Place &place, int count) {
  const int lane = threadIdx.x % 32;
  if (lane < count) ring.awaitFull(place.after(lane));
  __syncwarp();
}

/** A warp is done with `count` pages from `place` on. */
__device__ __forceinline__ void release(const Ring &ring, const Place &place, int count) {
  __syncwarp();
  const int lane = threadIdx.x % 32;
  if (lane < count) barrierArrive(ring.emptyOf(place.after(lane)));
}

/** Threads that multiply wait for each other. */
__device__ __forceinline__ void meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
}
