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

constexpr int STEP = 64;             // elements of K
constexpr int STAGE = (ROWS + TOKENS) * STEP * 2;
constexpr int CONSUMERS = ROWS * 2;  // threads: a warpgroup for 64 rows
// Sums by token; a row's padding puts what a warp stores at once into different banks.
constexpr int PITCH = ROWS + 4;

static_assert(ROWS % 64 == 0 && TOKENS % 8 == 0, "whole fragments");

extern __shared__ __align__(1024) unsigned char shared[];

struct Product {
  int rows, k, tokens;
  /** Blocks of a cluster, and steps of K that are under way. */
  int split, stages;
  int epilogue;
  void *out;
  int outStride;
  int gelu;
  const int *positions;
  /** First byte of each row's slot; 0 marks a row that only pads the batch. */
  const u64 *slots;
  Rope rope;
  int heads, kvHeads, headDim;
  u64 tokenStride, layerOffset;

  __device__ __forceinline__ bool paired() const { return epilogue == GLU || epilogue == ROPE; }
  /** Rows, or pairs of them, in W and in a tile. */
  __device__ __forceinline__ int units() const { return paired() ? rows >> 1 : rows; }
  __device__ __forceinline__ int tileUnits() const { return paired() ? ROWS / 2 : ROWS; }
  /** Tokens that a block of the cluster finishes, and bytes of their sums. */
  __device__ __forceinline__ int share() const { return TOKENS / split; }
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

/** The row of W that a tile's box begins with. */
__device__ __forceinline__ int rowOfBox(const Product &p, int tile, int box) {
  if (!p.paired()) return tile * ROWS + box * 64;
  int pair = tile * (ROWS / 2) + box / 2 * 32;
  if (p.epilogue == GLU) return pair + box % 2 * (p.rows >> 1);
  int half = p.headDim >> 1;
  return pair / half * p.headDim + pair % half + box % 2 * half;
}

/** Steps of K that a block of the cluster takes: from where, up to where. */
__device__ __forceinline__ int2 stepsOf(const Product &p, int rank) {
  int steps = (p.k + STEP - 1) / STEP;
  return make_int2(steps * rank / p.split, steps * (rank + 1) / p.split);
}

/** Fills the ring: all the weights that fit before the inputs are there, then both together. */
__device__ __forceinline__ void produce(const Product &p, const TensorMap *weights,
                                        const TensorMap *x, u32 ring, u32 full, u32 empty,
                                        int rank, int tiles, int tile) {
  constexpr u64 ONCE = 0x12F0000000000000ull, OFTEN = 0x14F0000000000000ull;
  int2 steps = stepsOf(p, rank);
  int ahead = 0, box = p.paired() ? 32 : 64, units = p.units(), tileUnits = p.tileUnits();
  auto weightsOf = [&](int stage, int tile, int step) {
    u32 barrier = full + stage * 8, to = ring + stage * STAGE;
    barrierExpect(barrier, STAGE);
    for (int b = 0; b * box < ROWS; b++) {
      loadMatrix(to + b * box * 128, weights, step * STEP, rowOfBox(p, tile, b), barrier, ONCE);
    }
  };
  auto inputOf = [&](int stage, int step) {
    loadMatrix(ring + stage * STAGE + ROWS * 128, x, step * STEP, 0, full + stage * 8, OFTEN);
  };
  int step = steps.x;
  auto advance = [&] {
    if (++step == steps.y) step = steps.x, tile += tiles;
  };
  auto more = [&] { return tile * tileUnits < units; };
  for (; ahead < p.stages && more(); ahead++, advance()) weightsOf(ahead, tile, step);
  awaitInputs();
  releaseDependents();
  for (int s = 0, at = steps.x; s < ahead; s++) {
    inputOf(s, at);
    if (++at == steps.y) at = steps.x;
  }
  int stage = 0;
  for (u32 parity = 0; more(); advance()) {
    barrierWait(empty + stage * 8, parity);
    weightsOf(stage, tile, step);
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

/** Four rows of a token, or as many as there are. */
__device__ __forceinline__ void finishRows(const Product &p, int t, int row, float4 v) {
  u64 at = (u64)t * p.outStride + row;
  bool whole = row + 4 <= p.rows && p.outStride % 4 == 0;
  if (p.epilogue == LOGITS) {
    float *out = (float *)p.out + at;
    if (whole) *(float4 *)out = v;
    else {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (row + i < p.rows) out[i] = ((float *)&v)[i];
      }
    }
    return;
  }
  bf16 *out = (bf16 *)p.out + at;
  if (whole) {
    if (p.epilogue == ADD) {
      uint2 old = *(const uint2 *)out;
      v = plus(v, make_float4(low(old.x), high(old.x), low(old.y), high(old.y)));
    }
    store4(out, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (row + i >= p.rows) break;
    float y = ((float *)&v)[i];
    out[i] = narrow(p.epilogue == ADD ? y + widen(out[i]) : y);
  }
}

/** Four pairs of a token: `pair` is the first; a the first ones, b their partners. */
__device__ __forceinline__ void finishPairs(const Product &p, int t, int pair, float4 a,
                                            float4 b) {
  float *x = (float *)&a, *y = (float *)&b;
  int half = p.headDim >> 1, head = p.epilogue == ROPE ? pair / half : 0, in = pair - head * half;
  int first = p.epilogue == ROPE ? head * p.headDim + in : pair;
  int second = first + (p.epilogue == ROPE ? half : p.rows >> 1);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    // As the product stored and read again would round.
    x[i] = rounded(x[i]), y[i] = rounded(y[i]);
  }
  if (p.epilogue == GLU) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = activate(x[i], p.gelu) * y[i];
    bf16 *out = (bf16 *)p.out + (u64)t * p.outStride + pair;
    if (pair + 4 <= p.rows >> 1) store4(out, a);
    else {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (pair + i < p.rows >> 1) out[i] = narrow(x[i]);
      }
    }
    return;
  }
  u64 slot = p.slots[t];
  if (slot == 0) return;
  int position = p.positions[t];
  bool isKey = head >= p.heads, isValue = head >= p.heads + p.kvHeads;
  if (!isValue) {
#pragma unroll
    for (int i = 0; i < 4; i++) rotate(p.rope, in + i, position, x[i], y[i]);
  }
  // K and V of a token lie one behind the other, as their rows do in W.
  bf16 *out = isKey ? (bf16 *)(slot + position * p.tokenStride + p.layerOffset) -
                          p.heads * p.headDim
                    : (bf16 *)p.out + (u64)t * p.outStride;
  store4(out + first, a);
  store4(out + second, b);
}

/** Sum of the cluster's blocks for four rows of a token, in the order of their parts of K. */
__device__ __forceinline__ float4 gather(const Product &p, const float *own, const float *others,
                                         int rank, int at) {
  float4 sum = *(const float4 *)((rank == 0 ? own : others) + at);
  for (int r = 1; r < p.split; r++) {
    const float *from = r == rank ? own : others + (r - (r > rank)) * p.share() * PITCH;
    sum = plus(sum, *(const float4 *)(from + at));
  }
  return sum;
}

__device__ __forceinline__ void consume(const Product &p, u32 ring, u32 full, u32 empty,
                                        u32 arrived, u32 taken, float *sums, int rank, int tiles,
                                        int tile) {
  const int thread = threadIdx.x, lane = thread % 32, group = thread / 128;
  int2 steps = stepsOf(p, rank);
  const bool paired = p.paired();
  const int units = p.units(), tileUnits = p.tileUnits(), share = p.share();
  const float *own = sums + rank * share * PITCH;
  float *others = sums + TOKENS * PITCH;
  int stage = 0;
  u32 parity = 0, round = 0;
  bool first = true;
  for (; tile * tileUnits < units; tile += tiles, round ^= 1) {
    float d[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) d[i] = 0;
    for (int step = steps.x; step < steps.y; step++) {
      barrierWait(full + stage * 8, parity);
      u32 w = ring + stage * STAGE + group * 64 * 128, x = ring + stage * STAGE + ROWS * 128;
      settle(d);
      productsBegin();
#pragma unroll
      for (int k = 0; k < STEP / 16; k++) {
        productShared(d, descriptor(w + k * 32, 16), descriptor(x + k * 32, 16), 1);
      }
      productsCommit();
      productsWait<0>();
      settle(d);
      if (lane == 0) barrierArrive(empty + stage * 8);
      if (++stage == p.stages) stage = 0, parity ^= 1;
    }
    // The last tile's sums are where they are wanted, and read.
    if (p.split > 1 && !first) barrierWait(taken, round ^ 1);
    int row = group * 64 + thread % 128 / 32 * 16 + lane / 4;
    float *to = sums + lane % 4 * 2 * PITCH + row;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
      to[j * 8 * PITCH] = d[j * 4], to[(j * 8 + 1) * PITCH] = d[j * 4 + 1];
      to[j * 8 * PITCH + 8] = d[j * 4 + 2], to[(j * 8 + 1) * PITCH + 8] = d[j * 4 + 3];
    }
    if (p.split > 1) {
      publishShared();
      meet();
      const u32 bytes = p.shareBytes();
      if (thread < p.split && thread != rank) {
        u32 to = address(others) + (rank - (rank > thread)) * bytes;
        sendShared(ofRank(to, thread), address(sums) + thread * bytes, bytes,
                   ofRank(arrived, thread));
      }
      if (thread == rank) barrierExpect(arrived, (p.split - 1) * bytes);
      barrierWait(arrived, round);
    } else {
      meet();
    }
    const int quads = tileUnits / 4;
    for (int i = thread; i < share * quads; i += CONSUMERS) {
      int of = i / quads, t = rank * share + of, quad = i % quads * 4;
      if (t >= p.tokens) break;
      int unit = tile * tileUnits + quad, at = of * PITCH + (paired ? quad / 32 * 32 : 0) + quad;
      float4 a = gather(p, own, others, rank, at);
      if (paired) {
        float4 b = gather(p, own, others, rank, at + 32);
        if (unit < units) finishPairs(p, t, unit, a, b);
      } else if (unit < units) {
        finishRows(p, t, unit, a);
      }
    }
    meet();
    if (p.split > 1 && thread < p.split) arriveAt(ofRank(taken, thread));
    first = false;
  }
  // A block may not end before others have what it sent, and have told it so.
  if (p.split > 1 && !first) barrierWait(taken, round ^ 1);
}

/** Clusters of `split` blocks take turns at tiles. x: [TOKENS, K], of which `tokens` count. */
extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, 1)
    skinny(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap x, int rows,
           int k, int tokens, int split, int stages, int epilogue, void *out, int outStride,
           int gelu, const int *positions, const u64 *slots,
           const float *frequencies, int dimensions, float magnitude, int heads, int kvHeads,
           int headDim, u64 tokenStride, u64 layerOffset) {
  const Product p = {rows, k, tokens, split, stages, epilogue, out, outStride, gelu,
                     positions, slots, {frequencies, dimensions, 0, magnitude}, heads, kvHeads,
                     headDim, tokenStride, layerOffset};
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
  if (p.split > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  if (producer) {
    if (threadIdx.x == CONSUMERS) {
      produce(p, &weights, &x, ring, full, empty, rank, tiles, tile);
    } else {
      awaitInputs();
      releaseDependents();
    }
    __syncwarp();
    if (p.split > 1) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
  } else {
    awaitInputs();
    releaseDependents();
    if (p.split > 1) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    consume(p, ring, full, empty, arrived, taken, sums, rank, tiles, tile);
  }
}
