// Owns how the blocks that share a row talk: through each other's shared memory, as a cluster, from
// compute capability 9.0 on (PTX ISA 8.0: mapa, barrier.cluster); before, a row has one block. What
// every warp has to tell costs it one store a block, and all of them a wait of about 1 µs.
#pragma once
#include "sample.cuh"

#define CLUSTER_MAX 8

/** As `clusterArrive`, of threads that have nothing to show yet. */
__device__ __forceinline__ void clusterBegin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
/** All threads of all blocks pass `clusterWait` once all have arrived. */
__device__ __forceinline__ void clusterArrive() {
#if __CUDA_ARCH__ >= 900
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
#endif
}
__device__ __forceinline__ void clusterWait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

__device__ __forceinline__ u32 placeOf(const void* mine) {
  return (u32)__cvta_generic_to_shared(mine);
}
/** Where block `rank` has what this one has at `mine`, in the window of the cluster. */
__device__ __forceinline__ u32 placeIn(int rank, const void* mine) {
  u32 place = placeOf(mine);
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(place) : "r"(rank));
#endif
  return place;
}
/**
 * A word with its own notice: an mbarrier of the block that it goes to counts bytes. Blocks need
 * not wait for more than that, nor writes to global memory be waited for.
 */
__device__ __forceinline__ void mailInit(u64* arrived) {
#if __CUDA_ARCH__ >= 900
  for (int turn = 0; turn < 2; turn++) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(placeOf(arrived + turn)) : "memory");
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void mailTo(int rank, u64* mine, u64 value, u64* arrived) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(
                   placeIn(rank, mine)),
               "l"(value), "r"(placeIn(rank, arrived))
               : "memory");
#else
  *mine = value;
#endif
}
/** All threads of the block call it. */
__device__ __forceinline__ void mailAwait(u64* arrived, int bytes, u32 phase) {
#if __CUDA_ARCH__ >= 900
  u32 place = placeOf(arrived);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(place), "r"(bytes)
                 : "memory");
  }
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra WAIT;\n}" ::"r"(place),
      "r"(phase)
      : "memory");
#else
  __syncthreads();
#endif
}
__device__ __forceinline__ u64 loadFrom(int rank, const u64* mine) {
#if __CUDA_ARCH__ >= 900
  u64 value;
  asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(placeIn(rank, mine))
               : "memory");
  return value;
#else
  return *mine;
#endif
}

__device__ __forceinline__ u32 dynamicSharedBytes() {
  u32 bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  return bytes;
}

static __device__ __noinline__ u64 sumUpTo(const u64* told, int end) {
  u64 sum = 0;
  for (int i = threadIdx.x & 31; i < end; i += 32) sum += told[i];
  return warpSum64(sum);
}

/** In shared memory: what all warps told this block, in two turns, and barriers that count it. */
struct Mail {
  u64 told[2][CLUSTER_MAX * WARPS];
  u64 arrived[2];
};

/**
 * The blocks of a row, and what their warps told each other: in two turns, so that a block may tell
 * what is next while others still hear what was last. Memory of others may be read between two
 * meetings; who does that has to meet once more before it ends.
 */
struct Team {
  int rank, size;
  Mail& mail;
  int turn;
  u32 phases;

  /** Others may not have begun before `begun`, which does not wait long if `begin` was early. */
  __device__ void begin() const {
    if (threadIdx.x == 0) mailInit(mail.arrived);
    clusterBegin();
  }
  __device__ void begun() const { clusterWait(); }

  /** All blocks are told `value` of lane 0, and hear what other warps say. */
  __device__ void exchange(u64 value) {
    tell(value);
    hear();
  }
  /** As `exchange`; what is in shared memory of others can be read then. */
  __device__ void meet(u64 value) {
    tell(value);
    clusterArrive();
    hear();
    clusterWait();
  }
  __device__ void tell(u64 value) const {
    int lane = threadIdx.x & 31;
    value = __shfl_sync(~0u, value, 0);
    if (lane < size) mailTo(lane, &mail.told[turn][self()], value, &mail.arrived[turn]);
  }
  __device__ void hear() {
    mailAwait(&mail.arrived[turn], size * WARPS * 8, phases >> turn & 1);
    phases ^= 1 << turn;
    turn ^= 1;
  }
  /** What warp `i` of all told before the last meeting. */
  __device__ u64 heard(int i) const { return mail.told[turn ^ 1][i]; }

  /** This warp among all of them, in order of the tokens that they look at. */
  __device__ int self() const { return rank * WARPS + (threadIdx.x >> 5); }

  __device__ u64 sum() const { return sumBefore(size * WARPS); }
  __device__ u64 sumBefore(int end) const { return sumUpTo(mail.told[turn ^ 1], end); }
  __device__ u64 most() const {
    u64 most = 0;
#pragma unroll 1
    for (int i = threadIdx.x & 31; i < size * WARPS; i += 32) most = max(most, heard(i));
    return warpMax64(most);
  }
  /** The n-th largest of what was told, n ≤ size · WARPS; `place` is shared memory. */
  __device__ u64 nth(int n, u64* place) const {
#pragma unroll 1
    for (int k = 0; k < size; k++) {
      u64 one = heard((threadIdx.x >> 5) * size + k);
      int above = 0, same = 0;
#pragma unroll 1
      for (int i = threadIdx.x & 31; i < size * WARPS; i += 32) {
        above += __popc(__ballot_sync(~0u, heard(i) > one));
        same += __popc(__ballot_sync(~0u, heard(i) == one));
      }
      if (above < n && above + same >= n) *place = one;
    }
    __syncthreads();
    return *place;
  }
};
