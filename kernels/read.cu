// Owns the reading of memory and nothing else: what bandwidth there is, for the roofline that other
// kernels are compared with. 16 bytes a load, eight under way a thread; the sum keeps the compiler
// from leaving them out.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(512)
    readAll(const uint4* from, u64 count, u32* out) {
  u32 sum = 0;
  u64 step = (u64)gridDim.x * blockDim.x;
  u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x;
  for (; i + 7 * step < count; i += 8 * step) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = loadStream(from + i + j * step);
#pragma unroll
    for (int j = 0; j < 8; j++) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < count; i += step) {
    uint4 v = loadStream(from + i);
    sum ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 12345u) *out = sum;
}
