// Owns which of several processes that listen on one TCP port gets a new connection: the one that
// says it has the least to do. It runs when the kernel completes a handshake (sk_reuseport).

#include <linux/bpf.h>
// The helpers need its types.
#include <bpf/bpf_helpers.h>

#define LISTENERS 16
#define ABSENT 0xffffffff

/** Requests of each listener, or ABSENT; src/net/steer.ts writes its own. */
struct loads {
  __u32 running[LISTENERS];
  /** Which port this is for, and where the other two parts are: user space finds them by this. */
  __u32 magic;
  __u32 port;
  __u64 namespace;
  __u32 listeners_id;
  __u32 program_id;
};

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, 1);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, struct loads);
} steer_loads SEC(".maps");

/** The kernel takes a socket out when it is closed. */
struct {
  __uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
  __uint(max_entries, LISTENERS);
  __type(key, __u32);
  __type(value, __u64);
} listeners SEC(".maps");

SEC("sk_reuseport")
int steer(struct sk_reuseport_md *md) {
  __u32 zero = 0;
  struct loads *l = bpf_map_lookup_elem(&steer_loads, &zero);
  if (!l) return SK_PASS;
  // A process that was killed is still in `loads`: then the next best, of four at most.
  for (int tries = 0; tries < 4; tries++) {
    __u32 best = 0, least = ABSENT;
    for (__u32 i = 0; i < LISTENERS; i++) {
      if (l->running[i] < least) {
        least = l->running[i];
        best = i;
      }
    }
    if (least == ABSENT) break;
    if (bpf_sk_select_reuseport(md, &listeners, &best, 0) == 0) {
      // Counted at once: of a burst, each must see the ones before it.
      __sync_fetch_and_add(&l->running[best & (LISTENERS - 1)], 1);
      return SK_PASS;
    }
    l->running[best & (LISTENERS - 1)] = ABSENT;
  }
  // The kernel's own choice, by hash.
  return SK_PASS;
}

char LICENSE[] SEC("license") = "GPL";
