// Owns Hopper's warpgroup products and descriptors of swizzled tiles in shared memory. PTX
// ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".

#pragma once

#include "tensor-core.cuh"

/**
 * A tile of rows of 128 bytes, 16-byte pieces swizzled by row % 8 as the copy engine does it; 8
 * rows lie 1024 bytes from the next 8. `across`: bytes to the next 64 columns where columns are
 * the long side (a transposed operand).
 */
__device__ __forceinline__ u64 descriptor(u32 at, u32 across) {
  return (u64)(at >> 4) | (u64)(across >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

/** The same tile some bytes further on, where that crosses no 128. */
__device__ __forceinline__ u64 advanced(u64 descriptor, int bytes) {
  return descriptor & ~0xffffffffull | ((u32)descriptor + bytes / 16);
}

__device__ __forceinline__ void productsBegin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void productsCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING> __device__ __forceinline__ void productsWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/** Keeps the compiler from moving accesses to sums over the products that write them. */
template <int N> __device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

/** What ordinary stores wrote to shared memory is seen by products and the copy engine. */
__device__ __forceinline__ void publishShared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#define NAMES_4 "%0,%1,%2,%3"
#define NAMES_8 NAMES_4 ",%4,%5,%6,%7"
#define NAMES_16 NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_24 NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define NAMES_32 NAMES_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_40 NAMES_32 "," \
  "%32,%33,%34,%35,%36,%37,%38,%39"
#define NAMES_48 NAMES_40 "," \
  "%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES_64 NAMES_48 "," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_128 NAMES_64 "," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define SUMS_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), \
    "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_16(d, i) SUMS_8(d, i), SUMS_8(d, i + 8)
#define SUMS_24(d, i) SUMS_16(d, i), SUMS_8(d, i + 16)
#define SUMS_32(d, i) SUMS_16(d, i), SUMS_16(d, i + 16)
#define SUMS_40(d, i) SUMS_32(d, i), SUMS_8(d, i + 32)
#define SUMS_48(d, i) SUMS_40(d, i), SUMS_8(d, i + 40)
#define SUMS_64(d, i) SUMS_32(d, i), SUMS_32(d, i + 32)
#define SUMS_128(d, i) SUMS_64(d, i), SUMS_64(d, i + 64)

// The operands' numbers follow the sums': A, B and whether to add; or four of A, B, and so on.
#define PRODUCTS(COLUMNS, COUNT, A, B, C, D, E) \
  /** d [64, COLUMNS] (+)= a [64, 16] · bᵀ, both from shared memory, rows of 16. */ \
  __device__ __forceinline__ void productShared(float (&d)[COUNT], u64 a, u64 b, int add) { \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #C ", 0; " \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" NAMES_##COUNT \
                 "}, %" #A ", %" #B ", p, 1, 1, 0, 0; }" \
                 : SUMS_##COUNT(d, 0) : "l"(a), "l"(b), "r"(add)); \
  } \
  /** d [64, COLUMNS] += a [64, 16] · b [16, COLUMNS], a from registers. */ \
  __device__ __forceinline__ void productRegisters(float (&d)[COUNT], const u32 (&a)[4], u64 b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" NAMES_##COUNT \
                 "}, {%" #A ", %" #B ", %" #C ", %" #D "}, %" #E ", 1, 1, 1, 1;" \
                 : SUMS_##COUNT(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
  } \
  /** d [64, COLUMNS] += a [64, 16] · bᵀ, a from registers, b rows of 16. */ \
  __device__ __forceinline__ void productHalf(float (&d)[COUNT], const u32 (&a)[4], u64 b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" NAMES_##COUNT \
                 "}, {%" #A ", %" #B ", %" #C ", %" #D "}, %" #E ", 1, 1, 1, 0;" \
                 : SUMS_##COUNT(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
  }

PRODUCTS(8, 4, 4, 5, 6, 7, 8)
PRODUCTS(16, 8, 8, 9, 10, 11, 12)
PRODUCTS(32, 16, 16, 17, 18, 19, 20)
PRODUCTS(48, 24, 24, 25, 26, 27, 28)
PRODUCTS(64, 32, 32, 33, 34, 35, 36)
PRODUCTS(80, 40, 40, 41, 42, 43, 44)
PRODUCTS(96, 48, 48, 49, 50, 51, 52)
PRODUCTS(128, 64, 64, 65, 66, 67, 68)
PRODUCTS(256, 128, 128, 129, 130, 131, 132)
