// Owns the product of a weight matrix with 1–4 tokens, which is as fast as the weights can be
// read: out = W·x, W [rows, K] bf16 row by row, x [TOKENS, K] bf16, float32 sums. 2·rows·K bytes: a
// 28,672 × 4,096 matrix is 235 MB, 76 µs at 3.09 TB/s. What surrounds the product rides along: an
// RMS norm before it; bias, residual sum, gated activation or rotation and KV append after it.
//
// A block owns a run of rows. Its warps split K, so that a lane's part of x stays in registers and
// every SM reads as many bytes, whatever the matrix. ROWS rows are in flight a lane; the first of
// them are asked for before the kernel may look at its inputs, and so is a piece of the rest (into
// L2): memory stays busy while the kernel before this one ends (programmatic dependent launch).
//
// Compiled for one shape (src/backends/cuda/gemv.ts chooses):
//   K; TOKENS 1|2|4; KWARPS warps along K; CHUNKS of 256 elements a warp; GROUPS of rows side by
//   side; ROWS in flight; EPILOGUE as below; INPUT_NORM 0|1; the next kernel may start
//   RELEASE_ROUNDS of loads before the last one.
// With E4M3 weights are of 8 bits and scaled by row (fp8.cuh), half the bytes; x stays bf16.
// Error: float32 sums in a fixed order, one rounding. Oracle: test/cuda/gemv.gpu.ts.
#include "rope.cuh"

#define STORE 0   // out[t][row] = y, bf16
#define ADD 1     // out[t][row] += y, bf16
#define GLU 2     // rows are [gate | up]: out[t][i] = act(gate[i])·up[i], bf16
#define LOGITS 3  // out[t][row] = y, float32
#define ROPE 4    // rows are [q | k | v]: q is rotated into out, k too and v into the slot

#ifndef K
#define K 4096
#define TOKENS 1
#define KWARPS 16
#define CHUNKS 1
#define GROUPS 1
#define ROWS 8
#define EPILOGUE ROPE
#define INPUT_NORM 1
#endif
#ifndef RELEASE_ROUNDS
#define RELEASE_ROUNDS 0
#endif
#ifndef E4M3
#define E4M3 0
#endif
#define PARTS (E4M3 ? 2 : 1)  // 16-byte loads of x beside one of a weight's row
#define WARPS (KWARPS * GROUPS)
#define VALUES (ROWS * TOKENS)
#define WHOLE (K == 256 * PARTS * KWARPS * CHUNKS)  // no lane is ever beyond a row's end
// Half an SM's registers: the next kernel's blocks fit beside, and fetch weights early.
#ifndef BLOCKS_PER_SM
#define BLOCKS_PER_SM (TOKENS == 1 && !E4M3 ? 2 : 1)
#endif
// A long x would take the registers that loads in flight need.
#define INPUT_SHARED (TOKENS * CHUNKS * PARTS > 4 || CHUNKS * PARTS > 2)

struct Epilogue {
  void* out;
  int outStride;
  /** Null for none; by row of W. */
  const float* bias;
  int gelu;
  const int* positions;
  /** First byte of each row's slot; 0 marks a row that only pads the batch. */
  const u64* slots;
  Rope rope;
  int heads, kvHeads, headDim;
  u64 tokenStride, layerOffset;
  /** With E4M3: by row of W. */
  const bf16* scales;
};

/** The two rows of W that pair `p` is made of: what an epilogue needs together. */
__device__ __forceinline__ int2 rowsOf(const Epilogue& e, int p, int rows) {
  if (EPILOGUE == GLU) return make_int2(p, p + (rows >> 1));
  if (EPILOGUE == ROPE) {
    int pairs = e.headDim >> 1, head = p / pairs;
    if (head < e.heads + e.kvHeads) {
      int2 at = pairOf(e.rope, p - head * pairs);
      return make_int2(head * e.headDim + at.x, head * e.headDim + at.y);
    }
  }
  return make_int2(2 * p, min(2 * p + 1, rows - 1));
}

__device__ __forceinline__ void finish(const Epilogue& e, int p, int t, int2 row, float a,
                                       float b, int rows) {
  if (E4M3) {
    a *= widen(e.scales[row.x]);
    b *= widen(e.scales[row.y]);
  }
  if (e.bias) {
    a += e.bias[row.x];
    b += e.bias[row.y];
  }
  if (EPILOGUE == GLU) {
    // As the product stored and read again would round.
    ((bf16*)e.out)[(u64)t * e.outStride + p] = narrow(activate(rounded(a), e.gelu) * rounded(b));
  } else if (EPILOGUE == LOGITS) {
    float* out = (float*)e.out + (u64)t * e.outStride;
    out[row.x] = a;
    if (2 * p + 1 < rows) out[row.y] = b;
  } else if (EPILOGUE == ROPE) {
    u64 slot = e.slots[t];
    if (slot == 0) return;
    int position = e.positions[t], head = row.x / e.headDim;
    bool isKey = head >= e.heads, isValue = head >= e.heads + e.kvHeads;
    a = rounded(a), b = rounded(b);
    if (!isValue) rotate(e.rope, p - head * (e.headDim >> 1), position, a, b);
    // K and V of a token lie one behind the other, as their rows do in W.
    bf16* out = isKey ? (bf16*)(slot + position * e.tokenStride + e.layerOffset) -
                            e.heads * e.headDim
                      : (bf16*)e.out + (u64)t * e.outStride;
    out[row.x] = narrow(a);
    out[row.y] = narrow(b);
  } else {
    bf16* out = (bf16*)e.out + (u64)t * e.outStride;
    if (EPILOGUE == ADD) a += widen(out[row.x]), b += widen(out[row.y]);
    out[row.x] = narrow(a);
    if (2 * p + 1 < rows) out[row.y] = narrow(b);
  }
}

__device__ __forceinline__ float dot8(uint4 w, uint4 x, float sum) {
  sum = fmaf(low(w.x), low(x.x), sum), sum = fmaf(high(w.x), high(x.x), sum);
  sum = fmaf(low(w.y), low(x.y), sum), sum = fmaf(high(w.y), high(x.y), sum);
  sum = fmaf(low(w.z), low(x.z), sum), sum = fmaf(high(w.z), high(x.z), sum);
  return fmaf(high(w.w), high(x.w), fmaf(low(w.w), low(x.w), sum));
}

#if E4M3
/** Adds the product of two weights of e4m3 in 16 bits with a pair of bf16. */
__device__ __forceinline__ float dot2(unsigned short w, u32 x, float sum) {
#if __CUDA_ARCH__ >= 890
  float a, b;
  asm volatile("{ .reg .b32 pair; .reg .b16 first, second; cvt.rn.f16x2.e4m3x2 pair, %2;"
      " mov.b32 {first, second}, pair; cvt.f32.f16 %0, first; cvt.f32.f16 %1, second; }"
      : "=f"(a), "=f"(b) : "h"(w));
  return fmaf(b, high(x), fmaf(a, low(x), sum));
#else
  __trap();
  return sum;
#endif
}
__device__ __forceinline__ float dot4(u32 w, u32 x, u32 y, float sum) {
  return dot2(w >> 16, y, dot2(w & 0xffff, x, sum));
}
#endif

/** Where it stands: hoisted loads would take the registers of those from global memory. */
__device__ __forceinline__ uint4 loadShared(const uint4* p) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"((u32)__cvta_generic_to_shared(p)) : "memory");
  return v;
}

/** COUNT sums over a warp in COUNT + log2(32 / COUNT) − 1 shuffles; lane l ends with the sum of
 *  value l / (32 / COUNT). Each step halves what a lane carries. */
template <int COUNT, int D = 16>
__device__ __forceinline__ float reduceAll(float* v, int lane) {
  if constexpr (COUNT > 1) {
    bool upper = lane & D;
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) {
      float give = upper ? v[i] : v[i + COUNT / 2], keep = upper ? v[i + COUNT / 2] : v[i];
      v[i] = keep + __shfl_xor_sync(~0u, give, D);
    }
    return reduceAll<COUNT / 2, D / 2>(v, lane);
  }
  float sum = v[0];
#pragma unroll
  for (int d = D; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  return sum;
}

/**
 * x: TOKENS rows of K; normWeight: with INPUT_NORM, K floats. prefetchRows: rows of the block to
 * bring into L2 ahead of time. Dynamic shared memory: 4·TOKENS·KWARPS bytes a row of the block and,
 * with INPUT_SHARED, 512·TOKENS·CHUNKS·PARTS·KWARPS bytes of x before that.
 */
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS_PER_SM)
    gemv(const bf16* weight, int rows, const bf16* x, const float* normWeight, float eps,
         int prefetchRows, void* out, int outStride, const float* bias, int gelu,
         const int* positions, const u64* slots, const float* frequencies, int dimensions,
         int interleaved, float magnitude, int heads, int kvHeads, int headDim, u64 tokenStride,
         u64 layerOffset
#if E4M3
         , const bf16* scales
#endif
         ) {
#if !E4M3
  const bf16* scales = nullptr;
#endif
  extern __shared__ uint4 shared[];
  float* partial = (float*)(shared + (INPUT_SHARED ? TOKENS * CHUNKS * PARTS * KWARPS * 32 : 0));
  __shared__ float scratch[TOKENS][33];
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  int kwarp = warp % KWARPS, group = warp / KWARPS;
  const Epilogue epilogue = {out, outStride, bias, gelu, positions, slots,
                             {frequencies, dimensions, interleaved, magnitude},
                             heads, kvHeads, headDim, tokenStride, layerOffset, scales};
  int pairs = (rows + 1) >> 1;
  int first = (int)((long long)pairs * blockIdx.x / gridDim.x);
  int count = 2 * ((int)((long long)pairs * (blockIdx.x + 1) / gridDim.x) - first);

#if __CUDA_ARCH__ >= 900
  for (int j = threadIdx.x; j < min(prefetchRows, count); j += 32 * WARPS) {
    int2 both = rowsOf(epilogue, first + (j >> 1), rows);
    const bf16* row = weight + (u64)(j & 1 ? both.y : both.x) * (K / PARTS);
    u32 bytes = K * 2 / PARTS;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(row), "r"(bytes) : "memory");
  }
#endif

  uint4 w[ROWS][CHUNKS];
  auto load = [&](int j, int r) {
    if (j >= count) return;
    int2 both = rowsOf(epilogue, first + (j >> 1), rows);
    const uint4* row = (const uint4*)(weight + (u64)(j & 1 ? both.y : both.x) * (K / PARTS));
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      int i = (c * KWARPS + kwarp) * 32 + lane;
      w[r][c] = WHOLE || i < K / 8 / PARTS ? loadStream(row + i) : make_uint4(0, 0, 0, 0);
    }
  };
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    for (int c = 0; c < CHUNKS; c++) w[r][c] = make_uint4(0, 0, 0, 0);
    load(group * ROWS + r, r);
  }

  awaitInputs();
  // Of the row's 16-byte loads, those beside a lane's weights.
  auto inputAt = [&](int part) {
    return (((part / PARTS) * KWARPS + kwarp) * 32 + lane) * PARTS + part % PARTS;
  };
  uint4 in[TOKENS][CHUNKS * PARTS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
#pragma unroll
    for (int c = 0; c < CHUNKS * PARTS; c++) {
      int i = inputAt(c);
      const uint4* from = (const uint4*)(x + (u64)t * K) + i;
      in[t][c] = WHOLE || i < K / 8 ? __ldcg(from) : make_uint4(0, 0, 0, 0);
    }
  }
  if (INPUT_NORM) {
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      float sum = 0.f;
#pragma unroll
      for (int c = 0; c < CHUNKS * PARTS; c++) sum = dot8(in[t][c], in[t][c], sum);
      sum = warpSum(sum);
      if (lane == 0 && group == 0) scratch[t][kwarp] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      float sum = 0.f;
      for (int i = 0; i < KWARPS; i++) sum += scratch[t][i];
      float scale = rsqrtf(sum / K + eps);
#pragma unroll
      for (int c = 0; c < CHUNKS * PARTS; c++) {
        int i = inputAt(c);
        if (!WHOLE && i >= K / 8) continue;
        float v[8];
        unpack8(in[t][c], v);
        for (int j = 0; j < 8; j++) v[j] *= scale * normWeight[i * 8 + j];
        in[t][c] = pack8(v);
      }
    }
  }
  // A lane reads what it wrote itself (or what its twins in other groups wrote, the same).
  auto place = [&](int t, int c) {
    return ((t * CHUNKS * PARTS + c) * KWARPS + kwarp) * 32 + lane;
  };
  if (INPUT_SHARED) {
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
      for (int c = 0; c < CHUNKS * PARTS; c++) shared[place(t, c)] = in[t][c];
    }
  }
  auto dot = [&](const uint4& row, int t, int c, float sum) {
    auto part = [&](int i) { return INPUT_SHARED ? loadShared(shared + place(t, i)) : in[t][i]; };
#if E4M3
    uint4 a = part(2 * c), b = part(2 * c + 1);
    sum = dot4(row.y, a.z, a.w, dot4(row.x, a.x, a.y, sum));
    return dot4(row.w, b.z, b.w, dot4(row.z, b.x, b.y, sum));
#else
    return dot8(row, part(c), sum);
#endif
  };

  for (int base = group * ROWS; base < count; base += GROUPS * ROWS) {
    // Released at once, the next kernel would take bandwidth long before its turn.
    if (base + RELEASE_ROUNDS * GROUPS * ROWS >= count) releaseDependents();
    float v[VALUES];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int t = 0; t < TOKENS; t++) v[r * TOKENS + t] = 0.f;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
          v[r * TOKENS + t] = dot(w[r][c], t, c, v[r * TOKENS + t]);
        }
      }
      load(base + GROUPS * ROWS + r, r);
    }
    float sum = reduceAll<VALUES>(v, lane);
    int value = lane / (32 / VALUES), j = base + value / TOKENS;
    if (lane % (32 / VALUES) == 0 && j < count) {
      partial[(j * TOKENS + value % TOKENS) * KWARPS + kwarp] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < (count >> 1) * TOKENS; i += 32 * WARPS) {
    int pair = i / TOKENS, t = i % TOKENS;
    float a = 0.f, b = 0.f;
    for (int k = 0; k < KWARPS; k++) {
      a += partial[((2 * pair) * TOKENS + t) * KWARPS + k];
      b += partial[((2 * pair + 1) * TOKENS + t) * KWARPS + k];
    }
    int p = first + pair;
    finish(epilogue, p, t, rowsOf(epilogue, p, rows), a, b, rows);
  }
}
