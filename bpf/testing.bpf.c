// Owns programs for tests and measurements: one for the other end of a veth pair, whose driver
// sends an answer by XDP only to an interface that has a program too, one that runs another on the
// same packet again and again, which that program changes each time, or on a HELLO that is new each
// time, and one that decides nothing.

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/udp.h>
// The helpers need their types.
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "protocol.h"
#include "siphash.h"

#define PACKET_BYTES 138 /* of a HELLO in IPv4 */

struct {
  __uint(type, BPF_MAP_TYPE_PROG_ARRAY);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, __u32);
} measured SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, unsigned char[PACKET_BYTES]);
} packet SEC(".maps");

SEC("xdp")
int pass(struct xdp_md *ctx) {
  return XDP_PASS;
}

SEC("xdp")
int again(struct xdp_md *ctx) {
  __u32 zero = 0;
  unsigned char *bytes = bpf_map_lookup_elem(&packet, &zero);
  if (!bytes) return XDP_ABORTED;
  bpf_xdp_store_bytes(ctx, 0, bytes, PACKET_BYTES);
  bpf_tail_call(ctx, &measured, 0);
  return XDP_PASS;
}

struct numbered {
  __u64 key[2];
  /** The next HELLO's. */
  __u64 request;
  unsigned char bytes[PACKET_BYTES + 6];
};

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, struct numbered);
} hello SEC(".maps");

SEC("xdp")
int fresh(struct xdp_md *ctx) {
  __u32 zero = 0;
  struct numbered *next = bpf_map_lookup_elem(&hello, &zero);
  if (!next) return XDP_ABORTED;
  bpf_xdp_store_bytes(ctx, 0, next->bytes, PACKET_BYTES);
  struct lt_header *h = (void *)(long)ctx->data + PACKET_BYTES - sizeof *h;
  if ((void *)(h + 1) > (void *)(long)ctx->data_end) return XDP_ABORTED;
  // As far from each other as those that clients draw.
  h->request = next->request += 0x9e3779b97f4a7c15;
  const __u64 *words = (const __u64 *)h;
  struct sip s;
  sip_begin(&s, next->key[0], next->key[1]);
  for (int i = 0; i < 11; i++) sip_word(&s, words[i]);
  h->mac = bpf_cpu_to_be64(sip_end(&s, 88ull << 56));
  bpf_tail_call(ctx, &measured, 0);
  return XDP_PASS;
}

struct head {
  struct ethhdr ethernet;
  struct iphdr ip;
  struct udphdr udp;
} __attribute__((packed));

/** Sends UDP to the protocol's port back as it came: what any answer from here takes at least. */
SEC("xdp")
int turn(struct xdp_md *ctx) {
  struct head *h = (void *)(long)ctx->data;
  if ((void *)(h + 1) > (void *)(long)ctx->data_end) return XDP_PASS;
  if (h->ethernet.h_proto != bpf_htons(ETH_P_IP) || h->ip.protocol != IPPROTO_UDP) return XDP_PASS;
  if (h->udp.dest != bpf_htons(LT_PORT)) return XDP_PASS;
  for (int i = 0; i < ETH_ALEN; i++) {
    __u8 byte = h->ethernet.h_source[i];
    h->ethernet.h_source[i] = h->ethernet.h_dest[i];
    h->ethernet.h_dest[i] = byte;
  }
  __be32 address = h->ip.saddr;
  h->ip.saddr = h->ip.daddr;
  h->ip.daddr = address;
  __be16 port = h->udp.source;
  h->udp.source = h->udp.dest;
  h->udp.dest = port;
  // A sender on the same machine leaves its sum to the driver.
  h->udp.check = 0;
  return XDP_TX;
}

char LICENSE[] SEC("license") = "GPL";
