// Owns what a request must find room in before it is granted: those that run, those that are
// remembered, its tenant's places and its tenant's bucket of tokens.
#pragma once

#include "ingress-maps.h"

static __always_inline __u64 cost_in_ns(const struct tenant *t, __u64 tokens) {
  return tokens * t->ns_per_token_1024 >> 10;
}

#define NEVER_MS 0xffffffff
/** The coarse clock is behind by a tick of the kernel at most, which is up to 10 ms. */
#define BEHIND_NS 10000000

/**
 * Charges a bucket (GCRA: one time stamp says how far ahead of its rate a tenant is).
 * @param now by the coarse clock; where a tick decides, the exact one is asked
 * @return 0, or the milliseconds after which the bucket will hold so many, or NEVER_MS
 */
__noinline __u32 charge(struct tenant *t, __u64 cost_tokens, __u64 now) {
  if (!t) return 1;
  __u64 cost_ns = cost_in_ns(t, cost_tokens);
  if (cost_ns > t->burst_ns) return NEVER_MS;
  int is_exact = 0;
  // As many tries as CPUs could plausibly charge one tenant in the same 100 ns.
#pragma clang loop unroll(disable)
  for (int i = 0; i < 9; i++) {
    __u64 full_at = *(volatile __u64 *)&t->full_at_ns;
    __u64 next = (full_at > now ? full_at : now) + cost_ns;
    if (next - now > t->burst_ns) {
      __u64 wait_ns = next - now - t->burst_ns;
      if (!is_exact && wait_ns <= BEHIND_NS) {
        now = bpf_ktime_get_ns();
        is_exact = 1;
        continue;
      }
      __u64 wait_ms = wait_ns / 1000000 + 1;
      return wait_ms >= NEVER_MS ? NEVER_MS - 1 : wait_ms;
    }
    if (__sync_val_compare_and_swap(&t->full_at_ns, full_at, next) == full_at) return 0;
  }
  return 1;
}

static __always_inline void give_back(struct tenant *t, __u64 tokens) {
  __sync_fetch_and_add(&t->full_at_ns, -cost_in_ns(t, tokens));
}

/** A place among those that run is low in a word, one among those that are remembered high. */
#define RUNS 1ull
#define REMEMBERED (1ull << 32)

static __always_inline int is_full(const __u32 *live, __u32 max) {
  return *(const volatile __u32 *)live >= max;
}

/** Takes a place among those that run and one among the remembered. */
static __always_inline int enter_all(struct control *c) {
  __u64 *both = (__u64 *)&c->live;
  __u64 before = __sync_fetch_and_add(both, RUNS + REMEMBERED);
  if ((__u32)before < c->live_max && before >> 32 < c->remembered_max) return 1;
  __sync_fetch_and_add(both, -(RUNS + REMEMBERED));
  return 0;
}

static __always_inline void leave_all(struct control *c) {
  __sync_fetch_and_add((__u64 *)&c->live, -(RUNS + REMEMBERED));
}

/** Takes one of a tenant's places. */
static __always_inline int enter(struct tenant *t) {
  if (__sync_fetch_and_add(&t->live, 1) < t->live_max) return 1;
  __sync_fetch_and_add(&t->live, -1);
  return 0;
}

/** All that `take` took. */
static __always_inline void put_back(struct control *c, struct tenant *t, __u32 cost) {
  give_back(t, cost);
  __sync_fetch_and_add(&t->live, -1);
  leave_all(c);
}

/**
 * Takes a request's places and tokens. What is refused writes nothing, as a rule: a flood of such
 * takes no other CPU's cache lines.
 * @return 0, or the code of what there is too little of; then nothing is taken
 */
static __always_inline __u16 take(struct control *c, struct tenant *t, __u32 cost, __u64 now,
                                  __u32 *retry_ms) {
  if (is_full(&c->live, c->live_max)) return LT_CODE_BUSY;
  if (is_full(&c->remembered, c->remembered_max)) {
    *retry_ms = 1;
    return LT_CODE_BUSY;
  }
  if (is_full(&t->live, t->live_max)) return LT_CODE_TENANT_BUSY;
  __u32 wait_ms = charge(t, cost, now);
  if (wait_ms == NEVER_MS) return LT_CODE_TOO_LARGE;
  *retry_ms = wait_ms;
  if (wait_ms) return LT_CODE_RATE;
  // Others may have been faster since.
  if (!enter_all(c)) {
    give_back(t, cost);
    return LT_CODE_BUSY;
  }
  if (!enter(t)) {
    leave_all(c);
    give_back(t, cost);
    return LT_CODE_TENANT_BUSY;
  }
  return 0;
}
