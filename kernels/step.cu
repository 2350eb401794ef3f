// Owns the borders of a step: its rows come from a ring in host memory that the GPU reads, its
// tokens go to one that the GPU writes. So a captured graph runs on new values with no copy, and
// the next step can be queued before this one's tokens are known: a row may say "the token that
// was sampled last". Launch-bound: 20 bytes a row over PCIe, 3 µs. Oracle: the logits of
// test/cuda/families.gpu.ts.
#include "common.cuh"

/** A row as the host writes it. */
struct Entry {
  /** -1: the slot's last sampled token. */
  int token;
  int position;
  /** -1: the row only pads the batch. */
  int slot;
  /** Its place among the step's outputs; -1 if its next token is not wanted. */
  int output;
  /** Where its slot's keys and values lie. */
  int region;
};

/** What is kept from step to step, and shown to the host in the same order but for the end. */
struct Progress {
  /** Steps done so far. */
  u64 steps;
  /** Nanoseconds between the end of a step and the beginning of the next, summed. */
  u64 idle;
  /** When the last step ended, by globaltimer; 0 before the first. */
  u64 end;
};

__device__ u64 nanoseconds() {
  u64 now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

/**
 * ring: `entries` of a step in each of `places`, rows first, from `segmentsAt` on its segments
 * (first row, position, count, region). What the other kernels read, by
 * row and by output: position, region's first byte, region, tokens in it with this one. Rows
 * that pad have 0 for all of them; an output's slot for sampling is -1 then.
 */
extern "C" __global__ void fetchStep(const Entry* ring, int places, int entries, int segmentsAt,
                                     Progress* progress, const int* lastTokens, u64 kvBase,
                                     u64 regionStride, int rows, int segments, int* tokens,
                                     int* positions, u64* bases, int* regions, int* lengths,
                                     int* outPositions, u64* outBases, int* outRegions,
                                     int* outLengths, int* outputRows, int* outputSlots,
                                     int* firstRows, int* starts, int* counts,
                                     int* segmentRegions) {
  awaitInputs();
  releaseDependents();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i == 0 && progress->end) progress->idle += nanoseconds() - progress->end;
  const Entry* place = ring + progress->steps % places * entries;
  // The host wrote it since the last step: it may not come from a cache.
  auto read = [&](int at) {
    const volatile int* from = (const volatile int*)(place + at);
    return Entry{from[0], from[1], from[2], from[3], from[4]};
  };
  if (i < segments) {
    Entry e = read(segmentsAt + i);
    firstRows[i] = e.token, starts[i] = e.position;
    counts[i] = e.slot, segmentRegions[i] = e.region;
  }
  if (i >= rows) return;
  Entry e = read(i);
  bool real = e.slot >= 0;
  int region = real ? e.region : 0, position = real ? e.position : 0;
  int length = real ? position + 1 : 0;
  u64 base = real ? kvBase + region * regionStride : 0;
  tokens[i] = !real ? 0 : e.token >= 0 ? e.token : lastTokens[e.slot];
  positions[i] = position, bases[i] = base, regions[i] = region, lengths[i] = length;
  if (e.output < 0) return;
  int o = e.output;
  outPositions[o] = position, outBases[o] = base, outRegions[o] = region, outLengths[o] = length;
  outputRows[o] = i, outputSlots[o] = real ? e.slot : -1;
}

/** Hands the outputs to the host: first what they are, then that the step is done. */
extern "C" __global__ void publishStep(const int* tokens, int outputs, int* ring, int places,
                                       int entries, Progress* progress, volatile u64* done) {
  awaitInputs();
  releaseDependents();
  int* to = ring + progress->steps % places * entries;
  for (int i = threadIdx.x; i < outputs; i += blockDim.x) to[i] = tokens[i];
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x) return;
  done[1] = progress->idle;
  __threadfence_system();
  done[0] = progress->steps += 1;
  progress->end = nanoseconds();
}

/** counts[slot, token] marks the tokens of a prompt, for the repetition penalty. */
extern "C" __global__ void markSeen(bf16* counts, const int* tokens, int count) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    counts[tokens[i]] = 0x8000;
  }
}

/** Weights without a file: uniform in ±scale, the same for the same seed. */
extern "C" __global__ void fillRandom(bf16* out, u64 count, u32 seed, float scale) {
  u64 step = gridDim.x * (u64)blockDim.x;
  for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < count; i += step) {
    u32 h = (u32)i * 2654435761u ^ (u32)(i >> 32) * 2246822519u ^ seed;
    h = (h ^ h >> 15) * 2246822519u;
    h = (h ^ h >> 13) * 3266489917u;
    h ^= h >> 16;
    out[i] = narrow(((int)h / 2147483648.f) * scale);
  }
}
