// Owns programs for tests and measurements: one for the other end of a veth pair, whose driver
// sends an answer by XDP only to an interface that has a program too, and one that runs another on
// the same packet again and again, which that program changes each time.

#include <linux/bpf.h>
// The helpers need its types.
#include <bpf/bpf_helpers.h>

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

char LICENSE[] SEC("license") = "GPL";
