// Owns what every kernel shares: bf16 in registers, sums over warps and blocks, the order in which
// dependent launches may touch memory. Included by text; needs no header but NVRTC's built-ins.
#pragma once

typedef unsigned short bf16;
typedef unsigned long long u64;
typedef unsigned int u32;
#define INFINITY __int_as_float(0x7f800000)

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((u32)x << 16); }

/** Two floats rounded to nearest even; a goes to the lower address. */
__device__ __forceinline__ u32 pack(float a, float b) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  return pair;
}
__device__ __forceinline__ bf16 narrow(float x) { return (bf16)pack(x, 0.f); }
/** What a float becomes when it is stored as bf16. */
__device__ __forceinline__ float rounded(float x) { return low(pack(x, 0.f)); }

__device__ __forceinline__ void unpack8(uint4 v, float* x) {
  x[0] = low(v.x), x[1] = high(v.x), x[2] = low(v.y), x[3] = high(v.y);
  x[4] = low(v.z), x[5] = high(v.z), x[6] = low(v.w), x[7] = high(v.w);
}
__device__ __forceinline__ uint4 pack8(const float* x) {
  return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

__device__ __forceinline__ float warpSum(float x) {
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}
__device__ __forceinline__ float warpMax(float x) {
  for (int d = 16; d; d >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

/** The block's sum in every thread; always in the same order. `scratch` holds 33 floats. */
__device__ __forceinline__ float blockSum(float x, float* scratch) {
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = (blockDim.x + 31) >> 5;
  x = warpSum(x);
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  float sum = 0.f;
  for (int i = 0; i < warps; i++) sum += scratch[i];
  return sum;
}

/**
 * Programmatic dependent launch: a kernel may start while the one before it still runs. Until
 * `awaitInputs` it may read nothing but weights, and write nothing. Every kernel that is launched
 * so calls it: that makes the order transitive. Before compute capability 9.0 these do nothing.
 */
__device__ __forceinline__ void awaitInputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void releaseDependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/** 16 bytes that are read once: they bypass L1 and leave L2 first. */
__device__ __forceinline__ uint4 loadStream(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

/**
 * Weight of a gate: silu is x·sigmoid(x); gelu is the tanh form (Hendrycks & Gimpel 2016), which is
 * x·sigmoid of twice the tangent's argument.
 */
__device__ __forceinline__ float activate(float x, int gelu) {
  float z = gelu ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x;
  return __fdividef(x, 1.f + __expf(-z));
}
