// Owns lists of the few tokens that matter, which the blocks of a row collect one by one and then
// all have whole: up to 256 of them, 16 bytes each.
#pragma once
#include "cluster.cuh"

#define LISTED 256
#define SHARERS (SAMPLE_THREADS / LISTED)  // threads that rank one token

struct Entry {
  u64 key, mass;
};

/** How many tokens, even those that found no room; smallest and largest of their keys. */
struct Members {
  u32 count, low;
  u64 high;
};

/** In shared memory. A block's own tokens lie in two turns, as what a team tells each other. */
struct Lists {
  Entry own[2][LISTED];
  Entry all[LISTED];
  Members members[2];
};

/** What `gather` found: how many tokens, in all blocks, and the range of their keys. */
struct Gathered {
  int count;
  u32 low, high;
};

/**
 * After a meeting of `blocks` that added: all tokens of a turn in `s.all` if there are at most
 * LISTED. The other turn's were read before that meeting, so they may be cleared now.
 */
static __device__ __noinline__ Gathered gatherLists(Lists& s, int turn, int blocks) {
  int lane = threadIdx.x & 31;
  u64 first = (u64)~0u << 32, high = 0;
  if (lane < blocks) {
    first = loadFrom(lane, (u64*)&s.members[turn].count);
    high = loadFrom(lane, &s.members[turn].high);
  }
  u32 count = (u32)first, total = __reduce_add_sync(~0u, count);
  Gathered found = {(int)total, __reduce_min_sync(~0u, (u32)(first >> 32)),
                    __reduce_max_sync(~0u, (u32)high)};
  if (threadIdx.x == 0) s.members[turn ^ 1] = {0, ~0u, 0};
  if (total <= LISTED) {
    u32 from = 0;
    for (int r = 0; r < blocks; r++) {
      u32 here = __shfl_sync(~0u, count, r), i = threadIdx.x - from;
      if (i < here) {
        const Entry* entry = &s.own[turn][i];
        s.all[threadIdx.x] = {loadFrom(r, &entry->key), loadFrom(r, &entry->mass)};
      }
      from += here;
    }
  }
  __syncthreads();
  return found;
}

struct List {
  Lists& s;
  int turn;

  __device__ explicit List(Lists& s) : s(s), turn(0) {
    if (threadIdx.x == 0) s.members[0] = {0, ~0u, 0};
  }
  __device__ __forceinline__ void add(u64 key, u64 mass) {
    u32 place = atomicAdd(&s.members[turn].count, 1u);
    if (place < LISTED) s.own[turn][place] = {key, mass};
  }
  /** Keys that this warp has added, as each lane knows them. */
  __device__ void range(u32 low, u32 high) {
    low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
    if ((threadIdx.x & 31) || low > high) return;
    atomicMin(&s.members[turn].low, low);
    atomicMax((u32*)&s.members[turn].high, high);
  }

  __device__ Gathered gather(const Team& team) {
    Gathered found = gatherLists(s, turn, team.size);
    turn ^= 1;
    return found;
  }

  /**
   * ranked(entry, masses of larger keys, masses of equal ones, how many of each) for each of the
   * first `count` of `s.all`, by one thread.
   */
  template <typename Ranked>
  __device__ __forceinline__ void rank(int count, Ranked ranked) const {
    int i = threadIdx.x / SHARERS;
    Entry mine = i < count ? s.all[i] : Entry{0, 0};
    u64 above = 0, equal = 0;
    int larger = 0, same = 0;
#pragma unroll 2
    for (int j = threadIdx.x % SHARERS; j < count; j += SHARERS) {
      Entry other = s.all[j];
      if (other.key > mine.key) above += other.mass, larger++;
      if (other.key == mine.key) equal += other.mass, same++;
    }
    for (int d = 1; d < SHARERS; d <<= 1) {
      above += __shfl_xor_sync(~0u, above, d), equal += __shfl_xor_sync(~0u, equal, d);
      larger += __shfl_xor_sync(~0u, larger, d), same += __shfl_xor_sync(~0u, same, d);
    }
    if (i < count && threadIdx.x % SHARERS == 0) ranked(mine, above, equal, larger, same);
  }
};
