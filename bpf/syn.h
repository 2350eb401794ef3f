// Owns the admission of plain TCP connections: how many a second one source may open, and all
// together. Counted by SYN in the driver, before the kernel has a socket for it; below the limits
// the kernel's own SYN cookies stand behind this.
#pragma once

#include <linux/tcp.h>

#include "ingress-maps.h"
#include "packet.h"

#define SOURCES 65536
/** Extension headers of IPv6 that are walked; what lies behind more goes on uncounted. */
#define EXTENSIONS 4

/**
 * When a source has its whole burst again, in ktime ns; the longest unused goes. Of IPv6 the first
 * 64 bits are a source, which one owner has all of.
 */
struct {
  __uint(type, BPF_MAP_TYPE_LRU_HASH);
  __uint(max_entries, SOURCES);
  __type(key, struct source);
  __type(value, __u64);
} syn_sources SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, __u64);
} syn_total SEC(".maps");

/**
 * Takes one from a bucket (GCRA). Two CPUs at once may both take the last one of a source: a limit
 * on floods need not be exact.
 */
static __always_inline int syn_take(__u64 *full_at, __u64 gap_ns, __u64 burst_ns, __u64 now) {
  __u64 at = *(volatile __u64 *)full_at;
  __u64 from = at > now ? at : now;
  if (from + gap_ns - now > burst_ns) return 0;
  __sync_fetch_and_add(full_at, from + gap_ns - at);
  return 1;
}

/** The TCP header behind a packet's extension headers; 0 if it has none. */
static __always_inline struct tcphdr *syn_tcp(void *data, void *end, struct packet *p) {
  __u8 protocol;
  void *at = packet_network(data, end, p, &protocol);
  if (!at) return 0;
  if (p->ip4 && p->ip4->frag_off & bpf_htons(IP_LATER_FRAGMENT)) return 0;
#pragma unroll
  for (int i = 0; i < EXTENSIONS && p->ip6; i++) {
    if (protocol != IPPROTO_HOPOPTS && protocol != IPPROTO_ROUTING &&
        protocol != IPPROTO_DSTOPTS && protocol != IPPROTO_FRAGMENT) {
      break;
    }
    __u8 *extension = at;
    if ((void *)(extension + 8) > end) return 0;
    at += protocol == IPPROTO_FRAGMENT ? 8 : 8 + extension[1] * 8;
    protocol = extension[0];
  }
  struct tcphdr *tcp = at;
  if (protocol != IPPROTO_TCP || (void *)(tcp + 1) > end) return 0;
  return tcp;
}

/** @return 0 if a frame asks for a connection to us that is one too many */
static __always_inline int syn_admit(void *data, void *end, const struct control *c) {
  struct packet p;
  struct tcphdr *tcp = syn_tcp(data, end, &p);
  if (!tcp || tcp->dest != bpf_htons(syn_port) || !tcp->syn || tcp->ack) return 1;
  if (!is_for_us(&p, c)) return 1;
  __u64 now = bpf_ktime_get_ns();
  count(C_SYN);
  if (syn_source_ns) {
    struct source from = packet_source(&p);
    if (p.ip6) from.address[1] = 0;
    __u64 *full_at = bpf_map_lookup_elem(&syn_sources, &from);
    if (!full_at) {
      __u64 first = now + syn_source_ns;
      bpf_map_update_elem(&syn_sources, &from, &first, BPF_NOEXIST);
    } else if (!syn_take(full_at, syn_source_ns, syn_source_burst_ns, now)) {
      count(C_SYN_SOURCE);
      return 0;
    }
  }
  __u32 zero = 0;
  __u64 *total = bpf_map_lookup_elem(&syn_total, &zero);
  if (syn_total_ns && total && !syn_take(total, syn_total_ns, syn_total_burst_ns, now)) {
    count(C_SYN_TOTAL);
    return 0;
  }
  return 1;
}
