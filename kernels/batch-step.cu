// Owns a decode step of 5–64 tokens on Hopper, from normed embeddings to logits, as one kernel that
// stays on every multiprocessor and follows a table of phases (batch-phases.cuh): products with
// what comes after them (batch-products.cuh), and attention (batch-attention.cuh). Weights, keys
// and values come through one ring of shared memory whatever phase they belong to (batch-feed.cuh),
// so memory stays busy while blocks wait for each other. An 8B model in bf16 and 64 sequences of
// 576 tokens are 20 GB, 6.5 ms at 3.08 TB/s.
//
// RMS norms are no phase: what adds to the residual stream also writes it times the next norm's
// weights, and sums of squares; the product that follows multiplies each token by 1/rms at its end.
// float32 sums in a fixed order, rounded where kernels of their own would round, but for the normed
// row, which is rounded before it is scaled. Launched cooperatively: blocks wait for each other.
//
// -D TOKENS 32|64, PAGES of the ring, HOLD of these, HEADS, KV_HEADS, HEAD_DIM, GROUP, WARPS of an
// attention worker (4); E4M3 1: weights of blocks are of 8 bits (batch-e4m3.cuh), the first norm's
// output lies as evens.cuh says. Dynamic shared memory: the ring, AREA_BYTES, SCRATCH floats,
// barriers.
// Oracle: kernels one by one, test/cuda/batch-step.gpu.ts.
#include "batch-feed.cuh"
#include "batch-products.cuh"

// In floats.
constexpr int ROW_SCALES = (CONSUMERS / 32 + 1) * TOKENS;
constexpr int SCRATCH = ROW_SCALES + SCALES_BYTES / 4;

extern __shared__ __align__(1024) unsigned char shared[];

/** Turns of all tokens' positions; every block writes the same, and reads what it wrote. */
__device__ __forceinline__ void computeTurns(float2 *turns, const Products &a, const Rope &rope) {
  constexpr int PAIRS = HEAD_DIM / 2;
  for (int i = threadIdx.x; i < a.tokens * PAIRS; i += CONSUMERS) {
    float cosine = 1.f, sine = 0.f;
    rotate(rope, i % PAIRS, a.positions[i / PAIRS], cosine, sine);
    turns[i] = make_float2(cosine, sine);
  }
}

/** The threads that multiply, attend and signal. done: see batch-feed.cuh. */
__device__ __forceinline__ void work(const Phase *phases, int first, int end,
                                     const Counters &counters, const Products &products,
                                     const Attending &attending, const Ring &ring, u32 done,
                                     float4 *area) {
  __shared__ Phase table[2];
  auto fetch = [&](int n) {
    if (n >= end || threadIdx.x >= sizeof(Phase) / 16) return;
    copy16(address(&table[n & 1]) + threadIdx.x * 16, (const uint4 *)(phases + n) + threadIdx.x);
  };
  auto fetched = [] { asm volatile("cp.async.wait_all;" ::: "memory"); };
  __shared__ volatile int progress[WORKERS];
  if (threadIdx.x < WORKERS) progress[threadIdx.x] = 0;
  fetch(first);
  fetched();
  meet();
  Place at;
  for (int n = first; n < end; n++) {
    const Phase &p = table[n & 1];
    fetch(n + 1);
    bool mine = true;
    if (p.kind == ATTENTION) {
      attendStretch(p, attending, ring, at, area + threadIdx.x / 128 * WARPS * WHOLE, progress,
                    counters.step * PHASES_MAX + n + 1, [&] {
                      if (threadIdx.x == 0 && n > first) counters.await(n - 1, p.arrivals);
                      meet();
                    });
    } else if (Share(p).some) {
      multiplyShare(p, products, ring, at);
    } else {
      mine = false;
    }
    seeForCopies();
    fetched();
    meet();
    if (threadIdx.x < WORKERS) progress[threadIdx.x] = 0;
    if (threadIdx.x) continue;
    if (mine) arrive(counters.of(n));
    barrierArrive(done);
  }
}

/**
 * Phases first … end - 1 of a step, whose last launch `last` is. exchange: odd words at first;
 * counters (four words and one a phase), parts: zeros.
 */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    batchStep(const Phase *phases, int first, int end, int last, u32 *all, int tokens,
              const int *positions, const int *lengths, const u64 *bases, const int *slots,
              const unsigned char *kv, u64 slotStride, u64 tokenStride, float scale,
              ulonglong2 *parts, uint4 *exchange, float *squares, float2 *turns,
              const float *frequencies, float magnitude) {
  const Ring ring = {address(shared), address(shared) + PAGES * PAGE + AREA_BYTES + SCRATCH * 4,
                     address(shared) + PAGES * PAGE + AREA_BYTES + SCRATCH * 4 + PAGES * 8};
  float4 *const area = (float4 *)(shared + PAGES * PAGE);
  float *const scratch = (float *)(shared + PAGES * PAGE + AREA_BYTES);
  const u32 done = ring.empty + PAGES * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < PAGES; i++) {
      barrierInit(ring.full + i * 8, 1);
      barrierInit(ring.empty + i * 8, CONSUMERS / 32);
    }
    barrierInit(done, 1);
  }
  barriersReady();
  const Attending attending = {kv, slots, lengths, tokens, slotStride, tokenStride, scale, parts};
  const int warp = threadIdx.x / 32;
  if (warp == CONSUMERS / 32) {
    feedWeights(phases, first, end, all, attending, ring, done);
  } else if (warp > CONSUMERS / 32) {
    awaitInputs();
    feedTokens(phases, first, end, Counters(all), attending, ring);
  } else {
    awaitInputs();
    const Counters counters(all);
    const Products products = {counters.step, tokens, positions, bases, tokenStride, exchange,
                               squares, turns, (float *)area, scratch,
                               scratch + CONSUMERS / 32 * TOKENS, (bf16 *)(scratch + ROW_SCALES)};
    computeTurns(turns, products, {frequencies, HEAD_DIM, 0, magnitude});
    meet();
    work(phases, first, end, counters, products, attending, ring, done, area);
    if (threadIdx.x == 0 && arriveAfter(all + 1) == gridDim.x - 1) {
      all[1] = 0;
      if (last) all[0] = counters.step + 1;
    }
  }
}
