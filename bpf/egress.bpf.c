// Owns what is known about answers as they leave: tokens and bytes by tenant and request, the class
// that routers see, and, for a tenant that is paced, when a datagram may go. It runs where the
// kernel's stack hands frames to the driver (tcx) and drops nothing but what is paced too far ahead.

#include "packet.h"

#define ANSWERS 65536
#define TCX_NEXT -1
#define TCX_DROP 2

/** UDP port of the protocol: answers come from it. */
const volatile __u16 port = LT_PORT;
/** A datagram that would have to wait longer is dropped, and repeated later: fq holds 10 s. */
const volatile __u64 horizon_ns = 2000000000;

/** src/net/egress.ts has the same layout. */
struct tenant_out {
  /** Price of a byte in ns / 1024; 0 is not paced. */
  __u64 ns_per_byte_1024;
  /** When the next paced datagram may go, in ktime ns. */
  __u64 next_ns;
  /** 0 to 63 (RFC 2474). */
  __u32 dscp;
  __u32 spare;
  __u64 datagrams;
  /** Of frames, without the preamble and checksum that the card adds. */
  __u64 bytes;
  /** Each once, however often it was sent. */
  __u64 tokens;
  __u64 repeats;
  __u64 ended;
  __u64 overdue;
  /** To two cache lines. */
  __u64 room[7];
};

struct answer_key {
  __be64 request;
  __u32 tenant;
  __u32 spare;
};

/** One ring thread sends all of a request, so these need no atomic operations. */
struct answer {
  __u64 datagrams;
  __u64 bytes;
  __u64 tokens;
  __u64 repeats;
  /** The number after the highest that was sent. */
  __u64 next;
  __u32 ended;
  __u32 code;
};

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, LT_TENANTS);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, struct tenant_out);
} tenants_out SEC(".maps");

/** The longest unused goes when it is full. */
struct {
  __uint(type, BPF_MAP_TYPE_LRU_HASH);
  __uint(max_entries, ANSWERS);
  __type(key, struct answer_key);
  __type(value, struct answer);
} answers SEC(".maps");

/** Counts a datagram for its request. Returns its new tokens; repeats bring none. */
static __always_inline __u64 account(struct tenant_out *t, const struct lt_header *h,
                                     __u64 count, __u32 bytes) {
  struct answer_key id = {.request = h->request, .tenant = bpf_ntohl(h->tenant)};
  struct answer *a = bpf_map_lookup_elem(&answers, &id);
  if (!a) {
    struct answer none = {};
    bpf_map_update_elem(&answers, &id, &none, BPF_NOEXIST);
    a = bpf_map_lookup_elem(&answers, &id);
    if (!a) return 0;
  }
  a->datagrams++;
  a->bytes += bytes;
  if (h->type != LT_TOKENS && h->type != LT_END) return 0;
  int end = h->type == LT_END;
  __u64 number = bpf_be64_to_cpu(h->word[end ? 1 : 2]);
  if (number < a->next) {
    a->repeats++;
    __sync_fetch_and_add(&t->repeats, 1);
  } else {
    a->next = number + 1;
  }
  if (end && !a->ended) {
    a->ended = 1;
    a->code = bpf_ntohs(h->code);
    __sync_fetch_and_add(&t->ended, 1);
  }
  // END says how many there were, TOKENS the first one's index and how many follow.
  __u64 tokens = end ? bpf_be64_to_cpu(h->word[2]) : bpf_be64_to_cpu(h->word[3]) + count;
  if (tokens <= a->tokens) return 0;
  __u64 fresh = tokens - a->tokens;
  a->tokens = tokens;
  return fresh;
}

/** Marks the class of a frame, keeping its two bits of congestion (RFC 3168). */
static __always_inline void mark(struct packet *p, __u8 dscp) {
  if (p->ip4) {
    __be16 *word = (__be16 *)p->ip4;
    __u32 before = *word;
    __u8 *tos = (__u8 *)p->ip4 + 1;
    *tos = dscp << 2 | (*tos & 3);
    // RFC 1624: HC' = ~(~HC + ~m + m')
    p->ip4->check = ~fold((__u16)~p->ip4->check + (__u16)~before + (__u64)*word);
  } else if (p->ip6) {
    __u8 *bytes = (__u8 *)p->ip6;
    bytes[0] = 0x60 | dscp >> 2;
    bytes[1] = (dscp & 3) << 6 | (bytes[1] & 0x3f);
  }
}

/** When a paced tenant's frame may go; 0 if that is beyond the horizon. */
static __always_inline __u64 departure(struct tenant_out *t, __u32 bytes, __u64 now) {
  __u64 cost = bytes * t->ns_per_byte_1024 >> 10;
  __u64 next = *(volatile __u64 *)&t->next_ns;
  __u64 at = next > now ? next : now;
  if (at - now > horizon_ns) return 0;
  // Two CPUs at once may let one frame go early; the time itself is not lost.
  __sync_fetch_and_add(&t->next_ns, at - next + cost);
  return at;
}

SEC("tc")
int egress(struct __sk_buff *skb) {
  struct packet p;
  // A frame's bytes may lie elsewhere; what is looked at must be in one piece.
  __u32 most = sizeof(struct ethhdr) + 8 + 60 + sizeof(struct udphdr) + sizeof *p.header + 2;
  __u32 linear = skb->data_end - skb->data;
  if (linear < most && linear < skb->len) {
    bpf_skb_pull_data(skb, skb->len < most ? skb->len : most);
  }
  void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
  if (!packet_parse(data, end, &p) || p.udp->source != bpf_htons(port)) return TCX_NEXT;
  struct lt_header *h = p.header;
  if (h->magic != bpf_htons(LT_MAGIC) || h->version != LT_VERSION) return TCX_NEXT;
  if (h->type != LT_TOKENS && h->type != LT_END && h->type != LT_ACK) return TCX_NEXT;
  __u32 index = bpf_ntohl(h->tenant);
  struct tenant_out *t = bpf_map_lookup_elem(&tenants_out, &index);
  if (!t) return TCX_NEXT;
  if (t->ns_per_byte_1024 && h->type != LT_ACK) {
    __u64 at = departure(t, skb->len, bpf_ktime_get_ns());
    if (!at) {
      __sync_fetch_and_add(&t->overdue, 1);
      return TCX_DROP;
    }
    skb->tstamp = at;
  }
  __be16 *count = (__be16 *)(h + 1);
  __u64 tokens = 0;
  if ((void *)(count + 1) <= end) tokens = bpf_ntohs(*count);
  tokens = account(t, h, tokens, skb->len);
  __sync_fetch_and_add(&t->tokens, tokens);
  __sync_fetch_and_add(&t->datagrams, 1);
  __sync_fetch_and_add(&t->bytes, skb->len);
  if (t->dscp) mark(&p, t->dscp & 63);
  return TCX_NEXT;
}

char LICENSE[] SEC("license") = "GPL";
