// Owns noticing that the other side of a connection has gone, when the kernel does: at its FIN or
// RST, however busy the process is that would read it. Watched is what a process accepts that is in
// the cgroup which this is attached to.

#include <linux/bpf.h>
// The helpers need its types.
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/** One record of the ring. */
struct gone {
  __u64 ktime_ns;
  /** In network order: ip6 of an IPv6 socket, else ip4. */
  __be32 ip6[4];
  __be32 ip4;
  __u16 is_ip6;
  __u16 port;
  /** It was reset; else it said that it sends no more. */
  __u32 reset;
  __u32 spare;
};

struct {
  __uint(type, BPF_MAP_TYPE_RINGBUF);
  __uint(max_entries, 1 << 16);
} disconnects SEC(".maps");

#define AF_INET6 10

SEC("sockops")
int disconnect(struct bpf_sock_ops *ops) {
  if (ops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) {
    bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG);
    return 1;
  }
  if (ops->op != BPF_SOCK_OPS_STATE_CB || ops->args[0] != BPF_TCP_ESTABLISHED) return 1;
  // FIN came, or it is over at once. If this side goes first it is FIN_WAIT1.
  __u32 now = ops->args[1];
  if (now != BPF_TCP_CLOSE_WAIT && now != BPF_TCP_CLOSE) return 1;
  struct gone *e = bpf_ringbuf_reserve(&disconnects, sizeof *e, 0);
  if (!e) return 1;
  e->ktime_ns = bpf_ktime_get_ns();
  e->ip6[0] = ops->remote_ip6[0];
  e->ip6[1] = ops->remote_ip6[1];
  e->ip6[2] = ops->remote_ip6[2];
  e->ip6[3] = ops->remote_ip6[3];
  e->ip4 = ops->remote_ip4;
  e->is_ip6 = ops->family == AF_INET6;
  e->port = bpf_ntohl(ops->remote_port);
  e->reset = now == BPF_TCP_CLOSE;
  e->spare = 0;
  bpf_ringbuf_submit(e, 0);
  return 1;
}

char LICENSE[] SEC("license") = "GPL";
