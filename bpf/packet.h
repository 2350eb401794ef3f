// Owns the way through Ethernet, VLAN, IP and UDP to a datagram of the protocol, and back: turning
// a received frame into its own answer.
#pragma once

#include <linux/bpf.h>
// The helpers need its types.
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>

#include "protocol.h"

struct vlan_header {
  __be16 tag;
  __be16 protocol;
};

/** Where things lie in a frame that holds a datagram of the protocol. */
struct packet {
  struct ethhdr *eth;
  /** One of the two, the other is null. */
  struct iphdr *ip4;
  struct ipv6hdr *ip6;
  struct udphdr *udp;
  struct lt_header *header;
};

/** An address of either kind, as it lies in a packet; IPv4 as ::ffff:a.b.c.d. */
struct source {
  __u64 address[2];
};

#define IP_FRAGMENT 0x3fff /* more fragments, or an offset */
#define IP_LATER_FRAGMENT 0x1fff /* an offset */

/**
 * Finds the way through Ethernet, VLAN and IP.
 * @param protocol set to what follows: of IPv6 the next header, which may be an extension
 * @return where that begins, which may be the end; 0 if the frame holds no IP
 */
static __always_inline void *packet_network(void *data, void *end, struct packet *p,
                                            __u8 *protocol) {
  struct ethhdr *eth = data;
  void *at = eth + 1;
  if (at > end) return 0;
  p->eth = eth;
  __be16 type = eth->h_proto;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (type != bpf_htons(ETH_P_8021Q) && type != bpf_htons(ETH_P_8021AD)) break;
    struct vlan_header *vlan = at;
    at = vlan + 1;
    if (at > end) return 0;
    type = vlan->protocol;
  }
  if (type == bpf_htons(ETH_P_IP)) {
    struct iphdr *ip = at;
    if ((void *)(ip + 1) > end || ip->version != 4 || ip->ihl < 5) return 0;
    p->ip4 = ip;
    p->ip6 = 0;
    *protocol = ip->protocol;
    return at + ip->ihl * 4;
  }
  if (type == bpf_htons(ETH_P_IPV6)) {
    struct ipv6hdr *ip = at;
    if ((void *)(ip + 1) > end || ip->version != 6) return 0;
    p->ip4 = 0;
    p->ip6 = ip;
    *protocol = ip->nexthdr;
    return ip + 1;
  }
  return 0;
}

/**
 * Finds what may be a header of the protocol, between any two ports.
 * @return 0 if the frame is anything else, or shorter than it says
 */
static __always_inline int packet_parse(void *data, void *end, struct packet *p) {
  __u8 protocol;
  struct udphdr *udp = packet_network(data, end, p, &protocol);
  if (!udp || protocol != IPPROTO_UDP) return 0;
  if (p->ip4 && p->ip4->frag_off & bpf_htons(IP_FRAGMENT)) return 0;
  if ((void *)(udp + 1) > end) return 0;
  struct lt_header *header = (void *)(udp + 1);
  if ((void *)(header + 1) > end) return 0;
  p->udp = udp;
  p->header = header;
  return 1;
}

static __always_inline struct source packet_source(const struct packet *p) {
  struct source from = {};
  if (p->ip4) {
    from.address[1] = (__u64)p->ip4->saddr << 32 | 0xffff0000;
  } else if (p->ip6) {
    from.address[0] = *(__u64 *)&p->ip6->saddr;
    from.address[1] = *((__u64 *)&p->ip6->saddr + 1);
  }
  return from;
}

static __always_inline __u16 fold(__u64 sum) {
  sum = (sum & 0xffffffff) + (sum >> 32);
  sum = (sum & 0xffff) + (sum >> 16);
  sum = (sum & 0xffff) + (sum >> 16);
  sum = (sum & 0xffff) + (sum >> 16);
  return sum;
}

/** Of so many words of eight bytes, for `fold`. */
static __always_inline __u64 sum_of(const __u64 *words, int count) {
  __u64 sum = 0;
#pragma unroll
  for (int i = 0; i < count; i++) sum += (words[i] & 0xffffffff) + (words[i] >> 32);
  return sum;
}

/**
 * Sends a HELLO back where it came from; its header is the answer's already. The checksum is
 * computed anew: what a sender on the same machine left for its card to fill in is not a sum yet.
 */
static __always_inline void packet_turn(struct packet *p) {
  struct ethhdr *eth = p->eth;
  struct udphdr *udp = p->udp;
#pragma unroll
  for (int i = 0; i < 3; i++) {
    __u16 *to = (__u16 *)eth->h_dest + i, *from = (__u16 *)eth->h_source + i;
    __u16 saved = *to;
    *to = *from;
    *from = saved;
  }
  // Ports, length and no sum yet, written as the word that the sum reads.
  __u64 ports = *(__u32 *)udp, length = udp->len;
  *(__u64 *)udp = length << 32 | (__u32)(ports << 16) | ports >> 16;
  __u64 sum = bpf_htons(IPPROTO_UDP) + length;
  if (p->ip4) {
    struct iphdr *ip = p->ip4;
    __be32 address = ip->saddr;
    ip->saddr = ip->daddr;
    ip->daddr = address;
    sum += (__u64)ip->saddr + ip->daddr;
  } else if (p->ip6) {
    __u64 *from = (__u64 *)&p->ip6->saddr, *to = (__u64 *)&p->ip6->daddr;
    sum += sum_of(from, 4);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      __u64 saved = to[i];
      to[i] = from[i];
      from[i] = saved;
    }
  }
  sum += sum_of((const __u64 *)udp, (sizeof *udp + sizeof(struct lt_header)) / 8);
  __u16 check = ~fold(sum);
  udp->check = check ? check : 0xffff;
}
