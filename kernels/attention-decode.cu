// Owns attention of one query token a row over its sequence's keys and values in strided memory.
//
// q, out  [rows, heads, HEAD_DIM] bf16; the GROUP query heads of a key/value head are neighbours.
// kv      address(slot, token) = kv + slot·slotStride + token·tokenStride, in bytes; row headRow of
//         HEAD_DIM bf16 is there the layer's first key; KV_HEADS keys come before as many values.
// map     the same memory as a tensor map (9.0 and later) of [slots, tokens, layers · 2 · KV_HEADS,
//         HEAD_DIM] bf16 with boxes of [1, TILE, 1, 64], swizzled by 128 bytes.
// slots, lengths  [rows] int32: row r sees tokens max(0, lengths[r] - window) … lengths[r] - 1 of
//         slot slots[r], and none beyond is read. A row of length 0 comes out as zeros.
// partial float32 scratch, arrivals [rows · KV_HEADS · WARPS] uint32, zero before and after.
//
// Work is cut evenly whatever the lengths (stream-K, Osama et al. 2023): all tiles of all rows and
// heads form one line, every block takes an equal stretch of it, and the last block to finish a
// part of a row merges the parts (flash decoding, Dao et al. 2023). Tiles are counted backwards
// from a row's last token, so that none reaches beyond it into memory that may not be mapped.
// Older tokens than that are asked for before the kernel that appends it has ended (programmatic
// dependent launch): it has to let this one start only when all before it are complete.
// Tokens are the long side of the tensor-core products (S' = K·Q', O' = V'·P'), which pads the
// group to 8 or 16 columns. Each warp has 16 tokens of a tile; in merging, a share of dimensions.
// Sums and softmax are float32: ‖error‖ ≤ 1e-2 of bf16 results, oracle test/cuda/attention.ts.
//
// -D HEAD_DIM GROUP KV_HEADS WARPS STAGES [SOFTCAP]

#include "attention-tiles.cuh"

// A stage: keys, then values, as panels.
constexpr int VALUES = PANELS * PANEL;
constexpr int STAGE = 2 * VALUES;

extern __shared__ __align__(1024) unsigned char shared[];

/**
 * Starts filling a stage with a tile's keys and values. Tokens before the first that is seen are
 * hidden later; in their place that one is copied again. The copy engine would do such a tile, too,
 * and heads that end within a panel, but for what is outside of the tensor it touches the tensor's
 * first address, which need not be mapped.
 */
__device__ __forceinline__ void copyTile(const Arguments &a, const Piece &p, int slot, int token,
                                         u32 to, u32 filled) {
  const int lane = threadIdx.x % 32, row = a.headRow + p.kvHead;
#if __CUDA_ARCH__ >= 900
  if (token >= 0 && HEAD_DIM % 64 == 0) {
    if (lane == 0) barrierExpect(filled, STAGE);
    else barrierArrive(filled);
    __syncwarp();
    if (lane >= 2 * PANELS) return;
    const int headRow = row + lane / PANELS * KV_HEADS;
    loadBox(to + lane * PANEL, a.map, lane % PANELS * 64, headRow, token, slot, filled);
    return;
  }
#endif
  constexpr int CHUNKS = HEAD_DIM / 8;
  const unsigned char *keys = a.kv + (u64)slot * a.slotStride + (u64)row * (HEAD_DIM * 2);
  for (int i = lane; i < 2 * TILE * CHUNKS && p.length > 0; i += 32) {
    const int chunk = i % CHUNKS, t = i / CHUNKS % TILE, values = i >= TILE * CHUNKS;
    const unsigned char *from = keys + (u64)max(token + t, p.first) * a.tokenStride;
    copy16(to + values * VALUES + chunk / 8 * PANEL + t * 128 + ((chunk ^ t) & 7) * 16,
           from + values * (KV_HEADS * HEAD_DIM * 2) + chunk * 16);
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(filled) : "memory");
}

/**
 * Copies the tiles of this block's pieces into the ring, one stage after another. Only a sequence's
 * last token, in the first of its tiles, may still be on its way when the kernel begins.
 */
__device__ __forceinline__ void produce(const Arguments &a, u32 stages, u32 full, u32 empty) {
  releaseDependents();
  Walk walk(a, blockIdx.x, gridDim.x);
  Piece p;
  int stage = 0;
  u32 parity = 1;
  bool all = false;
  while (walk.next(p)) {
    const int slot = a.slots[p.row];
    for (int tile = p.tile; tile < p.tile + p.tiles; tile++) {
      barrierWait(empty + stage * 8, parity);
      if (tile == 0 && !all) awaitInputs(), all = true;
      copyTile(a, p, slot, firstToken(p, tile), stages + stage * STAGE, full + stage * 8);
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
  }
}

/** What this multiprocessor keeps of other kernels' memory may be from before the last step. */
__device__ __forceinline__ void forgetCached(const int *any) {
  asm volatile("{ .reg .s32 t; ld.acquire.gpu.global.s32 t, [%0]; }" ::"l"(any) : "memory");
}

/** The warps that attend wait for each other. */
__device__ __forceinline__ void meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
}

__device__ __forceinline__ void consume(const Arguments &a, u32 stages, u32 full, u32 empty,
                                        float4 *area) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Walk walk(a, blockIdx.x, gridDim.x);
  awaitPredecessor();
  Piece p;
  int stage = 0;
  u32 parity = 0;
  while (walk.next(p)) {
    const u64 item = (u64)p.row * KV_HEADS + p.kvHead;
    const u64 group = item * GROUP * HEAD_DIM;
    u32 q[COLUMNS][STEPS][2];
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      const int at = c * 8 + lane / 4;
      const u32 *from = (const u32 *)(a.q + group + at * HEAD_DIM) + lane % 4;
#pragma unroll
      for (int k = 0; k < STEPS; k++)
        for (int i = 0; i < 2; i++) q[c][k][i] = at < GROUP ? from[k * 8 + i * 4] : 0;
    }
    Sums<STEPS> state;
    state.clear();
    for (int tile = p.tile; tile < p.tile + p.tiles; tile++) {
      barrierWait(full + stage * 8, parity);
      const int from = firstToken(p, tile);
      const int begin = p.first - from, end = p.length - tile * TILE - from;
      u32 keys[PANELS], values[PANELS];
#pragma unroll
      for (int i = 0; i < PANELS; i++) {
        keys[i] = stages + stage * STAGE + i * PANEL, values[i] = keys[i] + VALUES;
      }
      attend(a, state, keys, values, warp * 16, q, begin, end);
      __syncwarp();
      if (lane == 0) barrierArrive(empty + stage * 8);
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    state.total();
    // From here on a warp has all tokens, for its share of the dimensions.
    Sums<SHARE> sums;
    const int first = warp * SHARE;
    state.store(area + warp * WHOLE);
    meet();
    sums.gather<STEPS>(WARPS, [&](int w) { return area + w * WHOLE; }, first);
    meet();
    if (p.tiles < p.all) {
      const u32 from = walk.blockOf(p.start), to = walk.blockOf(p.start + p.all - 1);
      const auto part = [&](int i) {
        // A block has at most a part of what began before its stretch, and one of what goes on.
        const u32 place = (from + i) * 2 + (i == 0);
        return a.partial + (place * WARPS + warp) * PART;
      };
      sums.store(part(blockIdx.x - from));
      if (!arriveLast(a.arrivals + item * WARPS + warp, to - from + 1)) continue;
      sums.gather<SHARE>(to - from + 1, part, 0);
    }
    sums.output(a.out + group, first);
  }
}

extern "C" __global__ void __launch_bounds__((WARPS + 1) * 32)
    attentionDecode(const bf16 *q, bf16 *out, const __grid_constant__ TensorMap map,
                    const unsigned char *kv, const int *slots, const int *lengths, int rows,
                    int window, int headRow, u64 slotStride, u64 tokenStride, float scale,
                    float softcap, float4 *partial, u32 *arrivals) {
  const Arguments a = {q, out, &map, kv, slots, lengths, rows, window, headRow, slotStride,
                       tokenStride, scale, softcap, partial, arrivals};
  const u32 stages = address(shared);
  float4 *const area = (float4 *)(shared + STAGES * STAGE);
  const u32 full = address(area + WARPS * WHOLE), empty = full + STAGES * 8;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrierInit(full + s * 8, 32);
      barrierInit(empty + s * 8, WARPS);
    }
  }
  if (threadIdx.x == 32) prefetchMap(&map);
  barriersReady();
  forgetCached(lengths);
  if (threadIdx.x / 32 == WARPS) produce(a, stages, full, empty);
  else consume(a, stages, full, empty, area);
}
