// Owns a decode step of 1–4 tokens, from embedded tokens to logits, as one kernel that stays on
// every multiprocessor. It follows a table of phases (phases.cuh): products with what surrounds
// them, and attention. Between phases all blocks wait for each other, but not their weights
// (weight-stream.cuh has the drawing), so the step takes about as long as reading these: an 8B
// model in bf16 15 GB, 4.9 ms at 3.08 TB/s. The idea: Spector et al., "Look Ma, No Bubbles!",
// Hazy Research 2025.
//
// A warp computes whole rows; lanes split K, inputs lie in shared memory. float32 sums, rounded
// once where kernels of their own would round. Launched cooperatively: blocks wait for each other.
//
// -D TOKENS 1|2|4, WARPS, SLOTS, SEGMENT, TAKEN, HOLD, INPUT_BYTES (the largest input, or what
// attention needs), NORM_CHUNKS (of 8 · THREADS elements, of the longest row that is normed),
// HEADS, KV_HEADS, HEAD_DIM, SPLITS. Dynamic shared memory: WARPS·SLOTS·SEGMENT + INPUT_BYTES.
// Oracle: test/cuda/families.gpu.ts.
#include "step-attention.cuh"

static_assert(INPUT_BYTES >= ATTENTION_BYTES, "attention has room where inputs lie");

/** By a few threads; the others see it after a barrier. */
__device__ __forceinline__ void fetchPhase(Phase& into, const Phase& from) {
  if (threadIdx.x >= sizeof(Phase) / 16) return;
  ((uint4*)&into)[threadIdx.x] = __ldg((const uint4*)&from + threadIdx.x);
}

/** A thread's share of a norm's weights. */
struct NormWeights {
  float4 part[NORM_CHUNKS][2];

  __device__ __forceinline__ void load(const Phase& phase) {
    if (!phase.norm) return;
#pragma unroll
    for (int c = 0; c < NORM_CHUNKS; c++) {
      const int i = threadIdx.x + c * THREADS;
      if (i >= phase.k / 8) continue;
      part[c][0] = __ldg((const float4*)phase.norm + 2 * i);
      part[c][1] = __ldg((const float4*)phase.norm + 2 * i + 1);
    }
  }

  __device__ __forceinline__ uint4 apply(uint4 x, int c, float scale) const {
    float v[8];
    unpack8(x, v);
    const float4 a = part[c][0], b = part[c][1];
    v[0] *= scale * a.x, v[1] *= scale * a.y, v[2] *= scale * a.z, v[3] *= scale * a.w;
    v[4] *= scale * b.x, v[5] *= scale * b.y, v[6] *= scale * b.z, v[7] *= scale * b.w;
    return pack8(v);
  }
};

/** Brings a phase's input to shared memory, normed if it is to be. */
__device__ __forceinline__ void loadInput(const Phase& phase, const NormWeights& weights,
                                          uint4* input, float (*scratch)[WARPS]) {
  const uint4* from = (const uint4*)phase.in;
  const int chunks = phase.k / 8;
  if (!phase.norm) {
    for (int first = threadIdx.x; first < TOKENS * chunks; first += 4 * THREADS) {
      uint4 v[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (first + j * THREADS < TOKENS * chunks) v[j] = loadFresh(from + first + j * THREADS);
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (first + j * THREADS < TOKENS * chunks) input[first + j * THREADS] = v[j];
      }
    }
    __syncthreads();
    return;
  }
  uint4 in[TOKENS][NORM_CHUNKS];
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
#pragma unroll
    for (int c = 0; c < NORM_CHUNKS; c++) {
      const int i = threadIdx.x + c * THREADS;
      in[t][c] = i < chunks ? loadFresh(from + t * chunks + i) : make_uint4(0, 0, 0, 0);
    }
  }
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    float sum = 0.f;
#pragma unroll
    for (int c = 0; c < NORM_CHUNKS; c++) sum = dot8(in[t][c], in[t][c], sum);
    sum = warpSum(sum);
    if (threadIdx.x % 32 == 0) scratch[t][threadIdx.x / 32] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += scratch[t][w];
    const float scale = rsqrtf(sum / phase.k + phase.eps);
#pragma unroll
    for (int c = 0; c < NORM_CHUNKS; c++) {
      const int i = threadIdx.x + c * THREADS;
      if (i < chunks) input[t * chunks + i] = weights.apply(in[t][c], c, scale);
    }
  }
  __syncthreads();
}

/** Of a lane that has a token: where it is and where its keys and values go. */
struct Token {
  int position;
  /** First byte of its slot; 0 for a row that pads the batch. */
  u64 slot;
};

/** By token and pair of a head: cosine and sine of the angle that it turns by in every layer. */
typedef float2 Turns[TOKENS][HEAD_DIM / 2];

__device__ __forceinline__ void computeTurns(Turns& turns, const Rope& rope, const int* positions) {
  constexpr int PAIRS = HEAD_DIM / 2;
  for (int i = threadIdx.x; i < TOKENS * PAIRS; i += THREADS) {
    float cosine = 1.f, sine = 0.f;
    rotate(rope, i % PAIRS, positions[i / PAIRS], cosine, sine);
    turns[i / PAIRS][i % PAIRS] = make_float2(cosine, sine);
  }
}

__device__ __forceinline__ void place(const Phase& phase, const Token& token, u64 tokenStride,
                                      int2 row, float a, float b, float2 turn, int lane) {
  if (token.slot == 0) return;
  a = rounded(a), b = rounded(b);
  // K and V of a token lie one behind the other, as their rows do in W.
  bf16* out = row.x >= HEADS * HEAD_DIM
                  ? (bf16*)(token.slot + token.position * tokenStride + phase.layerOffset) -
                        HEADS * HEAD_DIM
                  : (bf16*)phase.out + lane * phase.outStride;
  out[row.x] = narrow(a * turn.x - b * turn.y);
  out[row.y] = narrow(a * turn.y + b * turn.x);
}

/** This warp's rows of phase `p`, a product; lane t ends with token t's and stores them. */
__device__ __forceinline__ void produce(const Phase& phase, int p, WeightStream& stream,
                                        const uint4* input, const Token& token,
                                        const Turns& turns, u64 tokenStride) {
  const int lane = threadIdx.x % 32, stride = phase.outStride;
  const Items items(phase);
  for (int item; (item = stream.next(p)) >= 0;) {
    // What the end of a row needs is asked for at its beginning, and not looked at before.
    bf16 before = 0;
    if (phase.kind == ADD && lane < TOKENS) {
      before = freshBf16((const bf16*)phase.out + lane * stride + item);
    }
    const float a = stream.dot(input, phase.k);
    const float b = items.pairs() ? stream.dot(input, phase.k) : 0.f;
    if (lane >= TOKENS) continue;
    if (phase.kind == ROPE) {
      constexpr int PAIRS = HEAD_DIM / 2;
      const bool turned = item < (HEADS + KV_HEADS) * PAIRS;
      const float2 turn = turned ? turns[lane][item % PAIRS] : make_float2(1.f, 0.f);
      place(phase, token, tokenStride, items.rowsOf(item), a, b, turn, lane);
    } else if (phase.kind == LOGITS) {
      ((float*)phase.out)[(u64)lane * stride + item] = a;
    } else {
      const float y = phase.kind == GLU ? activate(rounded(a), phase.gelu) * rounded(b) : a;
      ((bf16*)phase.out)[lane * stride + item] = narrow(y + widen(before));
    }
  }
}

/**
 * rope: of all rotations; counters: as `countersOf` has them, and headArrivals: zero before the
 * first step.
 */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    decodeStep(const Phase* phases, int count, u32* counters, const int* positions,
               const int* lengths, const u64* slots, u64 tokenStride, float scale, float* partial,
               u32* headArrivals, const float* frequencies, int dimensions, int interleaved,
               float magnitude) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ __align__(8) u64 barriers[WARPS * SLOTS];
  __shared__ int2 contents[WARPS * SLOTS];
  __shared__ float scratch[TOKENS][WARPS];
  __shared__ Phase table[2];
  __shared__ Turns turns;
  unsigned char* const input = shared + WARPS * SLOTS * SEGMENT;
  // The last step's is there: the kernel before this one lets it begin when all before are done.
  const u32 step = *(volatile u32*)counters;
  u32* const arrivals = countersOf(counters, step, count);
  fetchPhase(table[0], phases[0]);
  WeightStream stream(phases, count, arrivals + count, shared, barriers, contents);
  awaitInputs();
  if (blockIdx.x == 0) {
    u32* const next = countersOf(counters, step + 1, count);
    for (int i = threadIdx.x; i < 2 * count; i += THREADS) next[i] = 0;
  }
  computeTurns(turns, {frequencies, dimensions, interleaved, magnitude}, positions);
  const int lane = threadIdx.x % 32;
  Token token = {0, 0};
  if (lane < TOKENS) token = {positions[lane], slots[lane]};
  const AttentionMemory memory = {lengths, slots,   tokenStride, scale * LOG2E,
                                  partial, headArrivals};
  for (int p = 0; p < count; p++) {
    const Phase& phase = table[p & 1];
    if (p + 1 < count) fetchPhase(table[(p + 1) & 1], phases[p + 1]);
    if (phase.kind == ATTENTION) {
      attend(phase, memory, arrivals + p - 1, arrivals + p, (float*)input);
    } else {
      NormWeights weights;
      weights.load(phase);
      if (p > 0) await(arrivals + p - 1, phase.arrivals);
      loadInput(phase, weights, (uint4*)input, scratch);
      const Phase& next = table[(p + 1) & 1];
      if (p + 1 < count && next.kind == ATTENTION) Stretch(next, memory).prefetch();
      produce(phase, p, stream, (const uint4*)input, token, turns, tokenStride);
    }
    __syncthreads();
    if (phase.kind == ATTENTION) continue;
    if (threadIdx.x == 0) arrive(arrivals + p);
    __syncthreads();
    const bool attends = p + 1 < count && table[(p + 1) & 1].kind == ATTENTION;
    stream.proceed(p + (attends ? 2 : 1));
  }
  // All blocks have long read it: they arrived after that.
  if (blockIdx.x == 0 && threadIdx.x == 0) *counters = step + 1;
}
