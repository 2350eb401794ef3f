// Owns the table of what was granted, in memory that user space maps: the program enters requests,
// user space ends and removes them (src/net/granted-requests.ts). A hash map of the kernel's takes
// twice as long to add to, and is where a HELLO waits for memory longest: this one's line is
// fetched while the MAC is computed.
#pragma once

#include "ingress-maps.h"

/** Where a request is, if it is there. */
struct place {
  __u32 bucket;
  /** Never 0. */
  __u32 tag;
};

/** Keyed, so that nobody can choose requests that all have the same place. */
static __always_inline struct place place_of(const struct control *c, __be64 request,
                                             __u32 tenant) {
  __u64 hash = (request ^ c->table_key[0]) * (c->table_key[1] | 1);
  hash ^= hash >> 32;
  hash = (hash + tenant) * 0x9e3779b97f4a7c15ull;
  hash ^= hash >> 32;
  struct place at = {.tag = hash | 1};
  at.bucket = (hash >> 32) * (request_buckets - (PROBES - 1)) >> 32;
  return at;
}

/** A write does not wait for the line that it is to, as a read would. */
static __always_inline void place_fetch(const struct place *at) {
  __u32 index = at->bucket;
  struct bucket *b = bpf_map_lookup_elem(&requests, &index);
  if (b) *(volatile __u32 *)&b->fetched = 1;
}

#define NOWHERE (-1)
/** Another CPU is entering what may be the same. */
#define ENTERING (-2)

/** What is in a slot whose tag is the one that is sought. */
static __always_inline int is_there(const struct request *r, __be64 request, __u32 tenant) {
  if (*(const volatile __u32 *)&r->state == R_ENTERING) return ENTERING;
  return r->request == request && r->tenant == tenant;
}

/** Index of a request in a bucket, not looking at one of its slots. */
__noinline int find_in(struct bucket *b, __be64 request, __u32 tenant, __u32 tag, int except) {
  if (!b) return NOWHERE;
#pragma clang loop unroll(disable)
  for (int i = 0; i < SLOTS; i++) {
    if (*(volatile __u32 *)&b->tags[i] != tag || i == except) continue;
    int is = is_there(&b->slots[i], request, tenant);
    if (is) return is == ENTERING ? ENTERING : i;
  }
  return NOWHERE;
}

/** Takes a free slot, unless another CPU does for the same request. */
__noinline int take_slot(struct bucket *b, __be64 request, __u32 tenant, __u32 tag) {
  if (!b) return NOWHERE;
#pragma clang loop unroll(disable)
  for (int i = 0; i < SLOTS; i++) {
    __u32 seen = *(volatile __u32 *)&b->tags[i];
    if (!seen) seen = __sync_val_compare_and_swap(&b->tags[i], 0, tag);
    if (!seen) return i;
    if (seen == tag && is_there(&b->slots[i], request, tenant)) return ENTERING;
  }
  return NOWHERE;
}

/** @return 0 if it is none */
static __always_inline struct request *slot_of(struct bucket *b, __u32 slot) {
  // The compiler knows more of it than the verifier.
  OPAQUE(slot);
  return slot < SLOTS ? &b->slots[slot] : 0;
}

/** @param is_entering set if that may be so on another CPU */
static __always_inline struct request *request_find(const struct place *at, __be64 request,
                                                    __u32 tenant, int *is_entering) {
#pragma clang loop unroll(disable)
  for (int i = 0; i < PROBES; i++) {
    __u32 index = at->bucket + i;
    struct bucket *b = bpf_map_lookup_elem(&requests, &index);
    if (!b) return 0;
    int slot = find_in(b, request, tenant, at->tag, SLOTS);
    if (slot >= 0) return slot_of(b, slot);
    if (slot == ENTERING) *is_entering = 1;
    if (slot == ENTERING || !b->overflowed) return 0;
  }
  return 0;
}

/**
 * Enters a request that was not found.
 * @return 0 if there is no room, or another CPU is entering the same
 */
static __always_inline int request_enter(const struct place *at, const struct request *granted) {
  struct bucket *b = 0;
  int slot = NOWHERE;
#pragma clang loop unroll(disable)
  for (int i = 0; i < PROBES; i++) {
    __u32 index = at->bucket + i;
    b = bpf_map_lookup_elem(&requests, &index);
    if (!b) return 0;
    slot = take_slot(b, granted->request, granted->tenant, at->tag);
    if (slot == ENTERING) return 0;
    // One before ours may have become free meanwhile: who took it sees ours, or we see its.
    if (find_in(b, granted->request, granted->tenant, at->tag, slot) != NOWHERE) {
      __u32 ours = slot;
      OPAQUE(ours);
      if (ours < SLOTS) *(volatile __u32 *)&b->tags[ours] = 0;
      return 0;
    }
    if (slot != NOWHERE) break;
    b->overflowed = 1;
  }
  struct request *r = slot_of(b, slot);
  if (!r) return 0;
  *r = *granted;
  // Seen last: x86 keeps the order of writes.
  asm volatile("" ::: "memory");
  *(volatile __u32 *)&r->state = R_RUNS;
  return 1;
}
