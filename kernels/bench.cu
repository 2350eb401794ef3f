// Owns kernels that measurements are made with: one that takes a given time, one that only reads.
// Their oracle is `lattice bench gpu` itself, which prints what they measured.

/** Keeps one block busy for `ns` nanoseconds of the GPU's own clock (resolution 32 ns or more). */
extern "C" __global__ void spin(unsigned long long ns) {
  unsigned long long start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - start < ns);
}

/**
 * Reads `count` 16-byte words at `from`, as fast as they come: the ceiling of all that is bound by
 * memory. `sink` (4 bytes) is written only if the words' XOR is one number of 2^32.
 */
extern "C" __global__ void __launch_bounds__(512)
    read_all(const uint4 *from, unsigned long long count, unsigned *sink) {
  unsigned sum = 0;
  unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
  const unsigned long long stride = gridDim.x * (unsigned long long)blockDim.x;
#pragma unroll 8
  for (; i < count; i += stride) {
    const uint4 word = __ldcs(from + i);
    sum ^= word.x ^ word.y ^ word.z ^ word.w;
  }
  if (sum == 0x6c617474u) *sink = sum;
}
