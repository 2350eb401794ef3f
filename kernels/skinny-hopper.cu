// Owns the product of a weight matrix with 5–128 tokens on Hopper, at the rate that weights are
// read: out = W·x, W [rows, K] bf16 by rows, x [tokens, K] bf16, float32 sums. 2·rows·K bytes: a
// 28,672 × 4,096 matrix is 235 MB, 76 µs at 3.09 TB/s. What comes after the product rides along:
// residual sum, gated activation, or rotation and KV append.
//
// Weights are the tensor cores' long side: a tile is ROWS rows of W by TOKENS columns. The `split`
// blocks of a cluster share a tile's K and send each other their sums, each of which adds up those
// of its share of the tokens, in a fixed order. One warp feeds a ring of `stages` steps of 64
// elements through the copy engine. It asks for the first weights before the kernel may look at its
// inputs (programmatic dependent launch): memory stays busy while the kernels before this one end.
//
// Rows of a tile: ROWS neighbours; or, where the epilogue needs pairs (GLU: gate and up; ROPE: both
// halves of a head), 32 first ones, their 32 partners, and so on.
//
// -D ROWS TOKENS; the rest is arguments: a compile a pair of these is enough to try everything
// (src/backends/cuda/hopper-products.ts).
// Error: float32 sums in a fixed order, one rounding. Oracle: test/cuda/skinny.gpu.ts.

#include "rope.cuh"
#include "wgmma.cuh"

#define STORE 0   // out[t][row] = y, bf16
#define ADD 1     // out[t][row] += y, bf16
#define GLU 2     // rows are [gate | up]: out[t][i] = act(gate[i])·up[i], bf16
#define LOGITS 3  // out[t][row] = y, float32
#define ROPE 4    // rows are [q | k | v]: q is rotated into out, k too and v into the slot

constexpr int STEP = 64;  // elements of K
constexpr int STAGE = (ROWS + TOKENS) * STEP * 2;
constexpr int CONSUMERS = ROWS * 2;  // threads: a warpgroup for 64 rows
// Sums by token; a row's padding puts what a warp stores at once into different banks.
constexpr int PITCH = ROWS + 4;

// Items of a thread whose loads are under way together.
constexpr int BATCH = TOKENS < 32 ? 1 : TOKENS < 64 ? 2 : 4;

static_assert(ROWS % 64 == 0 && TOKENS % 8 == 0, "whole fragments");

extern __shared__ __align__(1024) unsigned char shared[];

/** A matrix [rows, k] in tiles of ROWS, the steps of each cut among `split` blocks. */
struct WeightTiles {
  int rows, k, split, epilogue, headDim;

  /** Whether a tile is 32 rows, their 32 partners and so on, instead of neighbours. */
  __device__ __forceinline__ bool paired() const { return epilogue == GLU || epilogue == ROPE; }
  /** That the copy engine brings at once. */
  __device__ __forceinline__ int boxRows() const { return paired() ? 32 : 64; }
  /** Rows, or pairs of them, in all and of a tile. */
  __device__ __forceinline__ int units() const { return paired() ? rows >> 1 : rows; }
  __device__ __forceinline__ int tileUnits() const { return paired() ? ROWS >> 1 : ROWS; }

  /** The row that a tile's box begins with. */
  __device__ __forceinline__ int rowOfBox(int tile, int box) const {
    if (!paired()) return tile * ROWS + box * 64;
    int pair = tile * tileUnits() + box / 2 * 32;
    if (epilogue == GLU) return pair + box % 2 * (rows >> 1);
    int half = headDim >> 1;
    return pair / half * headDim + pair % half + box % 2 * half;
  }

  /** Steps of K that a block of a cluster takes: from where, up to where. */
  __device__ __forceinline__ int2 stepsOf(int rank) const {
    int steps = (k + STEP - 1) / STEP;
    return make_int2(steps * rank / split, steps * (rank + 1) / split);
  }
};

struct Product {
  WeightTiles tiles;
  int tokens;
  /** Steps of K that are under way. */
  int stages;
  void *out;
  int outStride;
  int gelu;
  const int *positions;
  /** First byte of each row's slot; 0 marks a row that only pads the batch. */
  const u64 *slots;
  Rope rope;
  int heads, kvHeads;
  u64 tokenStride, layerOffset;

  /** Tokens that a block of the cluster finishes, and bytes of their sums. */
  __device__ __forceinline__ int share() const { return TOKENS / tiles.split; }
  __device__ __forceinline__ int shareBytes() const { return share() * PITCH * 4; }
};

/** A box of a matrix, 64 elements wide, with a hint of how long L2 is to keep it. */
__device__ __forceinline__ void loadMatrix(u32 to, const void *map, int x, int y, u32 barrier,
                                           u64 hint) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
               ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(x),
               "r"(y), "r"(barrier), "l"(hint) : "memory");
}

/** Where `at` of this block's shared memory is in another block of the cluster. */
__device__ __forceinline__ u32 ofRank(u32 at, int rank) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  return there;
}

/** Says no more than that it was here: what it read before is read. */
__device__ __forceinline__ void arriveAt(u32 barrier) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}

/** Copies to another block's shared memory; its barrier counts the bytes. */
__device__ __forceinline__ void sendShared(u32 to, u32 from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];" ::"r"(to), "r"(from), "r"(bytes), "r"(barrier) : "memory");
}

/** Threads that multiply wait for each other. */
__device__ __forceinline__ void meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
}

/** Fills the ring: all the weights that fit before the inputs are there, then both together. */
__device__ __forceinline__ void produce(const Product &p, const TensorMap *weights,
                                        const TensorMap *x, u32 ring, u32 full, u32 empty,
                                        int rank, int tiles, int tile) {
  constexpr u64 ONCE = 0x12F0000000000000ull, OFTEN = 0x14F0000000000000ull;
  const int lane = threadIdx.x % 32;
  const int2 steps = p.tiles.stepsOf(rank);
  const int boxRows = p.tiles.boxRows(), units = p.tiles.units(), tileUnits = p.tiles.tileUnits();
  // A lane brings a box of weights, the last one the tokens.
  int step = steps.x, row = p.tiles.rowOfBox(tile, lane);
  auto advance = [&] {
    if (++step < steps.y) return;
    step = steps.x, tile += tiles;
    row = p.tiles.rowOfBox(tile, lane);
  };
  auto more = [&] { return tile * tileUnits < units; };
  auto weightsOf = [&](int stage) {
    u32 barrier = full + stage * 8, to = ring + stage * STAGE + lane * boxRows * 128;
    if (lane == 0) barrierExpect(barrier, STAGE);
    if (lane * boxRows < ROWS) loadMatrix(to, weights, step * STEP, row, barrier, ONCE);
  };
  auto inputOf = [&](int stage, int step) {
    u32 barrier = full + stage * 8, to = ring + stage * STAGE + ROWS * 128;
    if (lane == 31) loadMatrix(to, x, step * STEP, 0, barrier, OFTEN);
  };
  int ahead = 0;
  for (; ahead < p.stages && more(); ahead++, advance()) weightsOf(ahead);
  awaitInputs();
  releaseDependents();
  for (int s = 0, at = steps.x; s < ahead; s++) {
    inputOf(s, at);
    if (++at == steps.y) at = steps.x;
  }
  int stage = 0;
  for (u32 parity = 0; more(); advance()) {
    barrierWait(empty + stage * 8, parity);
    // No lane may be left waiting for a phase that others have gone beyond.
    __syncwarp();
    weightsOf(stage);
    inputOf(stage, step);
    if (++stage == p.stages) stage = 0, parity ^= 1;
  }
}

__device__ __forceinline__ float4 plus(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ __forceinline__ void store4(bf16 *to, float4 v) {
  *(uint2 *)to = make_uint2(pack(v.x, v.y), pack(v.z, v.w));
}

/** Four rows of a token, or as many as there are; `old` is what was there if all four are. */
__device__ __forceinline__ void finishRows(const Product &p, int t, int row, float4 v,
                                           uint2 old) {
  u64 at = (u64)t * p.outStride + row;
  bool whole = row + 4 <= p.tiles.rows && p.outStride % 4 == 0;
  if (p.tiles.epilogue == LOGITS) {
    float *out = (float *)p.out + at;
    if (whole) *(float4 *)out = v;
    else {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (row + i < p.tiles.rows) out[i] = ((float *)&v)[i];
      }
    }
    return;
  }
  bf16 *out = (bf16 *)p.out + at;
  if (whole) {
    if (p.tiles.epilogue == ADD) {
      v = plus(v, make_float4(low(old.x), high(old.x), low(old.y), high(old.y)));
    }
    store4(out, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (row + i >= p.tiles.rows) break;
    float y = ((float *)&v)[i];
    out[i] = narrow(p.tiles.epilogue == ADD ? y + widen(out[i]) : y);
  }
}

/** Four gates of a token and what they let through, from `pair` on. */
__device__ __forceinline__ void finishGlu(const Product &p, int t, int pair, float4 a, float4 b) {
  float *x = (float *)&a, *y = (float *)&b;
  bf16 *out = (bf16 *)p.out + (u64)t * p.outStride + pair;
  // As the product stored and read again would round.
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = activate(rounded(x[i]), p.gelu) * rounded(y[i]);
  if (pair + 4 <= p.tiles.rows >> 1 && p.outStride % 4 == 0) return store4(out, a);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (pair + i < p.tiles.rows >> 1) out[i] = narrow(x[i]);
  }
}

/** Four pairs of a head of a token, from `pair` on. */
__device__ __forceinline__ void finishRope(const Product &p, int t, int pair, float4 a, float4 b) {
  float *x = (float *)&a, *y = (float *)&b;
  int half = p.tiles.headDim >> 1, head = pair / half, in = pair - head * half;
  u64 slot = p.slots[t];
  if (slot == 0) return;
  int position = p.positions[t];
  bool isKey = head >= p.heads, isValue = head >= p.heads + p.kvHeads;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[i] = rounded(x[i]), y[i] = rounded(y[i]);
    if (!isValue) rotate(p.rope, in + i, position, x[i], y[i]);
  }
  // K and V of a token lie one behind the other, as their rows do in W.
  bf16 *out = isKey ? (bf16 *)(slot + position * p.tokenStride + p.layerOffset) -
                          p.heads * p.tiles.headDim
                    : (bf16 *)p.out + (u64)t * p.outStride;
  out += head * p.tiles.headDim + in;
  store4(out, a);
  store4(out + half, b);
}

/** Four rows, or pairs, of a token that a thread finishes. */
struct Item {
  /** Among the block's tokens, and among all; where the sums are; which of W's rows or pairs. */
  int of, t, place, unit;

  __device__ __forceinline__ Item(const Product &p, int i, int rank, int tile) {
    const bool paired = p.tiles.paired();
    of = paired ? i / (ROWS / 8) : i / (ROWS / 4);
    int quad = 4 * (paired ? i % (ROWS / 8) : i % (ROWS / 4));
    t = rank * p.share() + of;
    place = of * PITCH + (paired ? quad / 32 * 32 : 0) + quad;
    unit = tile * p.tiles.tileUnits() + quad;
  }

  __device__ __forceinline__ bool exists(const Product &p) const {
    return of < p.share() && t < p.tokens && unit < p.tiles.units();
  }

  __device__ __forceinline__ u64 at(const Product &p) const {
    return (u64)t * p.outStride + unit;
  }

  /** Whether there is something to add to, all of which one load brings. */
  __device__ __forceinline__ bool addsWhole(const Product &p) const {
    return p.tiles.epilogue == ADD && exists(p) && unit + 4 <= p.tiles.rows &&
           p.outStride % 4 == 0;
  }
};

/** Sum of the cluster's blocks for four rows of a token, in the order of their parts of K. */
__device__ __forceinline__ float4 gather(const Product &p, const float *own, const float *others,
                                         int rank, int at) {
  float4 sum = *(const float4 *)((rank == 0 ? own : others) + at);
  for (int r = 1; r < p.tiles.split; r++) {
    const float *from = r == rank ? own : others + (r - (r > rank)) * p.share() * PITCH;
    sum = plus(sum, *(const float4 *)(from + at));
  }
  return sum;
}

__device__ __forceinline__ void consume(const Product &p, u32 ring, u32 full, u32 empty,
                                        u32 arrived, u32 taken, float *sums, int rank, int tiles,
                                        int tile) {
  const int thread = threadIdx.x, lane = thread % 32, group = thread / 128;
  int2 steps = p.tiles.stepsOf(rank);
  const bool paired = p.tiles.paired();
  const int units = p.tiles.units(), tileUnits = p.tiles.tileUnits(), share = p.share();
  const float *own = sums + rank * share * PITCH;
  float *others = sums + TOKENS * PITCH;
  int stage = 0;
  u32 parity = 0, round = 0;
  bool first = true;
  for (; tile * tileUnits < units; tile += tiles, round ^= 1) {
    float d[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) d[i] = 0;
    for (int step = steps.x, last = 0; step < steps.y; step++) {
      barrierWait(full + stage * 8, parity);
      u32 w = ring + stage * STAGE + group * 64 * 128, x = ring + stage * STAGE + ROWS * 128;
      productsBegin();
#pragma unroll
      for (int k = 0; k < STEP / 16; k++) {
        productShared(d, descriptor(w + k * 32, 16), descriptor(x + k * 32, 16), 1);
      }
      productsCommit();
      // The products of the step before are done: its place in the ring is free.
      productsWait<1>();
      if (lane == 0 && step > steps.x) barrierArrive(empty + last * 8);
      last = stage;
      if (++stage == p.stages) stage = 0, parity ^= 1;
      if (step + 1 < steps.y) continue;
      productsWait<0>();
      if (lane == 0) barrierArrive(empty + last * 8);
    }
    settle(d);
    // The last tile's sums are where they are wanted, and read.
    if (p.tiles.split > 1 && !first) barrierWait(taken, round ^ 1);
    int row = group * 64 + thread % 128 / 32 * 16 + lane / 4;
    float *to = sums + lane % 4 * 2 * PITCH + row;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
      to[j * 8 * PITCH] = d[j * 4], to[(j * 8 + 1) * PITCH] = d[j * 4 + 1];
      to[j * 8 * PITCH + 8] = d[j * 4 + 2], to[(j * 8 + 1) * PITCH + 8] = d[j * 4 + 3];
    }
    if (p.tiles.split > 1) {
      publishShared();
      meet();
      const u32 bytes = p.shareBytes();
      if (thread < p.tiles.split && thread != rank) {
        u32 to = address(others) + (rank - (rank > thread)) * bytes;
        sendShared(ofRank(to, thread), address(sums) + thread * bytes, bytes,
                   ofRank(arrived, thread));
      }
      if (thread == rank) barrierExpect(arrived, (p.tiles.split - 1) * bytes);
      barrierWait(arrived, round);
    } else {
      meet();
    }
    const int items = share * (paired ? ROWS / 8 : ROWS / 4);
    auto finish = [&](const Item &i, uint2 old) {
      if (!i.exists(p)) return;
      float4 a = gather(p, own, others, rank, i.place);
      if (p.tiles.epilogue != GLU) return finishRows(p, i.t, i.unit, a, old);
      finishGlu(p, i.t, i.unit, a, gather(p, own, others, rank, i.place + 32));
    };
    for (int base = thread; base < items && p.tiles.epilogue != ROPE; base += BATCH * CONSUMERS) {
      uint2 old[BATCH];
#pragma unroll
      for (int u = 0; u < BATCH; u++) {
        const Item i(p, base + u * CONSUMERS, rank, tile);
        old[u] = i.addsWhole(p) ? *(const uint2 *)((bf16 *)p.out + i.at(p)) : make_uint2(0, 0);
      }
#pragma unroll
      for (int u = 0; u < BATCH; u++) finish(Item(p, base + u * CONSUMERS, rank, tile), old[u]);
    }
    for (int at = thread; at < items && p.tiles.epilogue == ROPE; at += CONSUMERS) {
      const Item i(p, at, rank, tile);
      if (!i.exists(p)) continue;
      float4 a = gather(p, own, others, rank, i.place);
      finishRope(p, i.t, i.unit, a, gather(p, own, others, rank, i.place + 32));
    }
    meet();
    if (p.tiles.split > 1 && thread < p.tiles.split) arriveAt(ofRank(taken, thread));
    first = false;
  }
  // A block may not end before others have what it sent, and have told it so.
  if (p.tiles.split > 1 && !first) barrierWait(taken, round ^ 1);
}

/** Clusters of `split` blocks take turns at tiles. x: [TOKENS, K], of which `tokens` count. */
extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, 1)
    skinny(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap x, int rows,
           int k, int tokens, int split, int stages, int epilogue, void *out, int outStride,
           int gelu, const int *positions, const u64 *slots, const float *frequencies,
           int dimensions, float magnitude, int heads, int kvHeads, int headDim, u64 tokenStride,
           u64 layerOffset) {
  const Product p = {{rows, k, split, epilogue, headDim}, tokens, stages, out, outStride, gelu,
                     positions, slots, {frequencies, dimensions, 0, magnitude}, heads, kvHeads,
                     tokenStride, layerOffset};
  const u32 ring = address(shared);
  float *const sums = (float *)(shared + stages * STAGE);
  const u32 full = address(sums) + TOKENS * PITCH * 4 + (split - 1) * p.shareBytes();
  const u32 empty = full + stages * 8, arrived = empty + stages * 8, taken = arrived + 8;
  const bool producer = threadIdx.x >= CONSUMERS;
  const int rank = blockIdx.x % split, tile = blockIdx.x / split, tiles = gridDim.x / split;
  if (threadIdx.x == CONSUMERS) {
    prefetchMap(&weights);
    prefetchMap(&x);
    for (int s = 0; s < stages; s++) {
      barrierInit(full + s * 8, 1);
      barrierInit(empty + s * 8, CONSUMERS / 32);
    }
    barrierInit(arrived, 1);
    barrierInit(taken, split);
  }
  barriersReady();
  // Before anybody arrives at another block's barriers, these must be there.
  if (p.tiles.split > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  if (producer) {
    produce(p, &weights, &x, ring, full, empty, rank, tiles, tile);
    __syncwarp();
    if (p.tiles.split > 1) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
  } else {
    awaitInputs();
    releaseDependents();
    if (p.tiles.split > 1) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    consume(p, ring, full, empty, arrived, taken, sums, rank, tiles, tile);
  }
}
