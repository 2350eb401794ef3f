// Owns the decision about an inference request in the network driver: who may ask, whether there is
// room, which replica answers. It refuses and grants from the received frame and hands the prompt's
// datagrams to the replica's AF_XDP ring; everything that is not ours goes on untouched.

#include "ingress-maps.h"
#include "packet.h"
#include "siphash.h"

/** UDP port of the protocol. */
const volatile __u16 port = LT_PORT;
/** How far a HELLO's time may be from ours, and how long its number is remembered: 30 s. */
const volatile __u64 window_us = 30000000;
/** Fragments that a client may have in flight: 64 × 1,200 bytes are 7 ms at 100 Mbit/s. */
const volatile __u64 credit = 64;
/** A replica that holds a prefix is passed over with over load_factor_2 / 2 × least + slack. */
const volatile __u32 load_factor_2 = 3;
const volatile __u32 load_slack = 4;
/** One decision in so many becomes an event; a power of two, 0 for none. */
const volatile __u32 sample_every = 0;

/** TCP port whose new connections are counted and limited (syn.h); 0 is off. */
const volatile __u16 syn_port = 0;
/** Time between two connections of one source, or of all, that may go on; 0 is no limit. */
const volatile __u64 syn_source_ns = 0;
const volatile __u64 syn_source_burst_ns = 0;
const volatile __u64 syn_total_ns = 0;
const volatile __u64 syn_total_burst_ns = 0;
/** Of the table of requests (requests.h). */
const volatile __u32 request_buckets = PROBES;

/** Keeps the compiler from what it knows of x: else it makes arithmetic a branch again. */
#define OPAQUE(x) asm volatile("" : "+r"(x))

// They use what is above.
#include "limits.h"
#include "requests.h"

static __always_inline void count(enum counter which) {
  __u32 zero = 0;
  struct counters *c = bpf_map_lookup_elem(&counts, &zero);
  if (c) c->count[which]++;
}

static __always_inline struct tenant_use *tenant_use(const struct lt_header *h) {
  __u32 index = bpf_ntohl(h->tenant);
  return bpf_map_lookup_elem(&tenant_uses, &index);
}

// Functions that are not static are verified once, on their own, instead of along every path that
// leads to a call: without that the program is too large for the verifier.

/** SipHash of the header but for its MAC. */
__noinline __be64 header_mac(const struct lt_header *h, __u64 key0, __u64 key1) {
  if (!h) return 0;
  const __u64 *words = (const __u64 *)h;
  struct sip s;
  sip_begin(&s, key0, key1);
#pragma unroll
  for (int i = 0; i < 11; i++) sip_word(&s, words[i]);
  return bpf_cpu_to_be64(sip_end(&s, 88ull << 56));
}

/** What a cookie proves: the words that it is the hash of. */
struct proof {
  __u64 word[5];
};

__noinline __be64 cookie_of(const struct proof *p, __u64 key0, __u64 key1) {
  if (!p) return 0;
  struct sip s;
  sip_begin(&s, key0, key1);
#pragma unroll
  for (int i = 0; i < 4; i++) sip_word(&s, p->word[i]);
  return bpf_cpu_to_be64(sip_end(&s, p->word[4]));
}

static __always_inline __be64 packet_cookie(const struct packet *p, const struct control *c,
                                            const struct source *from, __be32 route) {
  const struct lt_header *h = p->header;
  struct proof proof = {.word = {(__u64)route << 32 | h->tenant, h->request, from->address[0],
                                 from->address[1],
                                 36ull << 56 | (__u64)p->udp->source << 16}};
  return cookie_of(&proof, c->cookie_key[0], c->cookie_key[1]);
}

/** As good as comparing cookies, which are of nothing else that may differ. */
static __always_inline int is_from(const struct packet *p, const struct source *from,
                                   const struct request *r) {
  return r->from.address[0] == from->address[0] && r->from.address[1] == from->address[1] &&
         r->from_port == p->udp->source;
}

/** What was decided about a HELLO. */
struct verdict {
  __u16 code;
  /** It was granted before. */
  __u8 is_repeat;
  __u32 retry_ms;
  __be32 route;
  __be64 cookie;
};

static __always_inline void tell(const struct lt_header *h, __u8 type, const struct verdict *v) {
  if (!sample_every || (bpf_get_prandom_u32() & (sample_every - 1))) return;
  struct event *e = bpf_ringbuf_reserve(&events, sizeof *e, 0);
  if (!e) return count(C_EVENTS_LOST);
  e->ktime_ns = bpf_ktime_get_ns();
  e->request = bpf_be64_to_cpu(h->request);
  e->tenant = bpf_ntohl(h->tenant);
  e->route = bpf_ntohl(h->route);
  e->prompt_bytes = bpf_ntohl(h->prompt_bytes);
  e->max_tokens = bpf_ntohl(h->max_tokens);
  e->type = type;
  e->is_repeat = v->is_repeat;
  e->code = v->code;
  e->retry_ms = v->retry_ms;
  bpf_ringbuf_submit(e, 0);
}

/** Changes some bytes of the header, of which none is beyond the word of eight that begins it. */
static __always_inline void set_bytes(struct lt_header *h, __u32 at, __u32 bytes, __u64 value) {
  __u64 *word = (__u64 *)h + at / 8;
  __u32 shift = at % 8 * 8;
  __u64 changed = (*word & ~(((1ull << bytes * 8) - 1) << shift)) | value << shift;
  OPAQUE(changed);
  *word = changed;
}

/**
 * Turns the HELLO into its answer. Written word by word: one that is put together from smaller
 * writes cannot be read, by the hash that follows, before the last of them has reached the cache.
 */
static __always_inline int answer(struct packet *p, const __u64 *key, __u64 now_us,
                                  const struct verdict *v) {
  struct lt_header *h = p->header;
  __u8 type = v->code ? LT_REJECT : LT_GRANT;
  set_bytes(h, 2, 2, LT_VERSION | type << 8);
  set_bytes(h, offsetof(struct lt_header, code), 2, bpf_htons(v->code));
  h->time_us = bpf_cpu_to_be64(now_us);
  set_bytes(h, offsetof(struct lt_header, route), 4, v->route);
  set_bytes(h, offsetof(struct lt_header, deadline_ms), 4, bpf_htonl(v->retry_ms));
  h->word[0] = v->cookie;
  h->word[1] = v->code ? 0 : bpf_cpu_to_be64(credit);
  h->word[2] = 0;
  h->word[3] = 0;
  h->mac = header_mac(h, key[0], key[1]);
  tell(h, type, v);
  packet_turn(p);
  return XDP_TX;
}

/** Replicas that hold the longest published prefix of this prompt, a bit each. */
__noinline __u64 holders(const struct lt_header *h) {
  if (!h) return 0;
#pragma unroll
  for (int i = 3; i >= 0; i--) {
    __be64 hash = h->word[i];
    if (!hash) continue;
    __u64 *found = bpf_map_lookup_elem(&prefixes, &hash);
    if (found && *found) return *found;
  }
  return 0;
}

/** Added to the score of a replica that cannot be chosen; loads are far below. */
#define UNFIT (1ull << 48)

/** 1 unless x is 0. Arithmetic, not a branch: the verifier follows every path of 16 replicas. */
static __always_inline __u64 truth(__u64 x) {
  x |= -x;
  OPAQUE(x);
  x >>= 63;
  OPAQUE(x);
  return x;
}

static __always_inline __u64 smaller(__u64 a, __u64 b) {
  __u64 less = a - b;
  OPAQUE(less);
  less = -(less >> 63);
  OPAQUE(less);
  return b ^ ((a ^ b) & less);
}

/** Index of the replica that answers, or minus the code that says why there is none. */
__noinline int choose(struct control *c, __u32 model, __u64 holding) {
  if (!c) return -LT_CODE_NO_REPLICA;
  __u64 ready = 0;
  // A score is the load and, so that the lowest of equals wins, the index.
  __u64 any = UNFIT, holder = UNFIT;
  __u32 end = c->replicas_end;
#pragma clang loop unroll(disable)
  for (__u32 i = 0; i < REPLICAS && i < end; i++) {
    struct replica *r = &c->replicas[i];
    __u64 other_model = truth(model) & truth(r->model ^ model);
    __u64 unfit = (truth(r->ready) ^ 1) | other_model;
    __u64 score = ((__u64)r->live + r->other) << 8 | i | unfit * UNFIT;
    ready |= r->ready;
    any = smaller(score, any);
    holder = smaller(score | (~holding >> i & 1) * UNFIT, holder);
  }
  if (any >= UNFIT) return ready ? -LT_CODE_MODEL : -LT_CODE_NO_REPLICA;
  __u64 most = (any >> 8) * load_factor_2 + 2 * load_slack;
  if (holder < UNFIT && (holder >> 8) * 2 <= most) any = holder;
  return any & (REPLICAS - 1);
}

/**
 * False for what is only passing through to another machine. Of numbers below 2^32 only 0 less 1
 * has its highest bit set: no branches, as above.
 */
static __always_inline int is_for_us(const struct packet *p, const struct control *c) {
  if (!c->addresses) return 1;
  __u64 hit = 0;
  if (p->ip4) {
    __u32 to = p->ip4->daddr;
    if (to == c->address4[0]) return 1;
#pragma unroll
    for (int i = 0; i < ADDRESSES; i++) hit |= (__u64)(c->address4[i] ^ to) - 1;
  } else if (p->ip6) {
    const __u64 *to = (const __u64 *)&p->ip6->daddr;
#pragma unroll
    for (int i = 0; i < ADDRESSES; i++) {
      __u64 other = (c->address6[i][0] ^ to[0]) | (c->address6[i][1] ^ to[1]);
      hit |= (__u64)(__u32)(other | other >> 32) - 1;
    }
  }
  return hit >> 63;
}

// Connections are limited where they are for us, which is defined above.
#include "syn.h"

/** What is granted must come in where a ring is: a flow stays on its queue. */
static __always_inline int has_ring(const struct xdp_md *ctx, const struct control *c) {
  return !c->queues || c->queues >> (ctx->rx_queue_index & (QUEUES - 1)) & 1;
}

static __always_inline int well_formed(const struct lt_header *h) {
  __u32 bytes = bpf_ntohl(h->prompt_bytes), tokens = bpf_ntohl(h->max_tokens);
  if (bytes == 0 || bytes > LT_PROMPT_BYTES_MAX) return 0;
  if (tokens == 0 || tokens > LT_MAX_TOKENS_MAX) return 0;
  if (h->route || h->fragment || h->code) return 0;
  if (bpf_ntohs(h->flags) & ~LT_FLAGS) return 0;
  return bpf_ntohs(h->fragments) == (bytes + LT_FRAGMENT_BYTES - 1) / LT_FRAGMENT_BYTES;
}

/**
 * Decides about a HELLO that really is from its tenant.
 * @param expires when its time will be outside the window
 */
static __always_inline void decide(struct packet *p, const struct place *place, struct control *c,
                                   struct tenant *t, __u64 now, __u64 expires,
                                   struct verdict *v) {
  struct lt_header *h = p->header;
  struct source from = packet_source(p);
  __u32 tenant = bpf_ntohl(h->tenant);
  int is_entering = 0;
  struct request *before = request_find(place, h->request, tenant, &is_entering);
  if (before) {
    // Or a recorded repeat could start it again once the first HELLO is forgotten.
    if (before->expires_ns < expires) before->expires_ns = expires;
    int same = before->prompt_bytes == h->prompt_bytes && before->max_tokens == h->max_tokens &&
               before->model == h->model && before->first_word == h->word[0];
    if (!same || before->state == R_ENDED || !is_from(p, &from, before)) {
      v->code = LT_CODE_REUSED;
      return;
    }
    v->route = before->route;
    v->cookie = before->cookie;
    v->is_repeat = 1;
    count(C_REPEATED);
    return;
  }
  __u32 cost = (bpf_ntohl(h->prompt_bytes) + 3) / 4 + bpf_ntohl(h->max_tokens);
  __u32 model = bpf_ntohl(h->model);
  int replica = choose(c, model, 0);
  if (replica < 0) {
    v->code = -replica;
    return;
  }
  v->code = take(c, t, cost, now, &v->retry_ms);
  if (v->code) return;
  __u64 holding = holders(h);
  if (holding) {
    int holder = choose(c, model, holding);
    if (holder >= 0) replica = holder;
  }
  struct request granted = {
      .request = h->request,
      .tenant = tenant,
      .granted_ns = now,
      .expires_ns = expires,
      .first_word = h->word[0],
      .from = from,
      .prompt_bytes = h->prompt_bytes,
      .max_tokens = h->max_tokens,
      .model = h->model,
      .route = bpf_htonl(replica + 1),
      .charged_tokens = cost,
      .from_port = p->udp->source,
  };
  granted.cookie = packet_cookie(p, c, &from, granted.route);
  __u32 at = replica;
  // The compiler knows that it is small and drops the mask that the verifier needs.
  OPAQUE(at);
  __u32 *load = &c->replicas[at & (REPLICAS - 1)].live;
  // Before it is entered: an atomic operation waits for the writes before it, and those to the
  // table wait for memory.
  __sync_fetch_and_add(load, 1);
  if (is_entering || !request_enter(place, &granted)) {
    // Its buckets are full; or its repeat was as fast, on another CPU, and is granted already.
    v->code = LT_CODE_BUSY;
    v->retry_ms = 1;
    __sync_fetch_and_add(load, -1);
    put_back(c, t, cost);
    return;
  }
  v->route = granted.route;
  v->cookie = granted.cookie;
  count(C_GRANTED);
  struct tenant_use *use = tenant_use(h);
  if (!use) return;
  use->granted++;
  use->charged_tokens += cost;
}

/** Much more than the clocks can be apart. */
#define AHEAD_NS 1000000000

static __always_inline int on_hello(struct packet *p, const struct place *place,
                                    struct control *c, struct tenant *t, const __u64 *key) {
  struct lt_header *h = p->header;
  struct verdict v = {};
  // Coarse: the exact one takes a tenth of all that is done here.
  __u64 now = bpf_ktime_get_coarse_ns();
  __u64 now_us = now / 1000 + c->clock_offset_us;
  __u64 age_us = now_us - bpf_be64_to_cpu(h->time_us) + window_us;
  count(C_HELLO);
  if (h->version != LT_VERSION) v.code = LT_CODE_VERSION;
  else if (age_us > 2 * window_us) v.code = LT_CODE_CLOCK;
  else if (!well_formed(h)) v.code = LT_CODE_MALFORMED;
  else {
    // User space forgets by the exact clock, which is ahead: by a tick, or more on a machine that
    // is itself a guest and was not run for a while.
    __u64 expires = now + (2 * window_us - age_us) * 1000 + AHEAD_NS;
    decide(p, place, c, t, now, expires, &v);
  }
  if (v.code) {
    count(C_REJECTED);
    count(C_CODE + ((v.code - LT_CODE_VERSION) & 15));
    struct tenant_use *use = tenant_use(h);
    if (use) use->rejected++;
  }
  return answer(p, key, now_us, &v);
}

/**
 * The datagram is of a request that was granted, for no more than it was charged for. One that has
 * ended takes no more DATA, or a recorded prompt could be sent again; it still hears ACK.
 */
static __always_inline int is_current(const struct lt_header *h, const struct request *r) {
  if (r->state == R_ENDED && h->type == LT_DATA) return 0;
  return bpf_ntohl(h->prompt_bytes) <= bpf_ntohl(r->prompt_bytes) &&
         bpf_ntohl(h->max_tokens) <= bpf_ntohl(r->max_tokens) && r->model == h->model &&
         r->route == h->route;
}

/** Hands a datagram of a granted request to its replica. */
static __always_inline int forward(struct xdp_md *ctx, struct packet *p,
                                   const struct place *place, struct control *c) {
  struct lt_header *h = p->header;
  __u32 replica = bpf_ntohl(h->route) - 1;
  struct source from = packet_source(p);
  int is_entering = 0;
  struct request *r = request_find(place, h->request, bpf_ntohl(h->tenant), &is_entering);
  // A cookie is computed only to count what is dropped as what it is.
  int is_proven = r && h->word[0] == r->cookie && h->route == r->route && is_from(p, &from, r);
  if (replica >= REPLICAS ||
      (!is_proven && h->word[0] != packet_cookie(p, c, &from, h->route))) {
    count(C_BAD_COOKIE);
    return XDP_DROP;
  }
  if (!r || !is_current(h, r)) {
    count(C_STALE);
    return XDP_DROP;
  }
  __u32 queue = ctx->rx_queue_index;
  if (queue < QUEUES) {
    long action = bpf_redirect_map(&rings, replica * QUEUES + queue, XDP_DROP);
    if (action == XDP_REDIRECT) {
      count(C_FORWARDED);
      return action;
    }
  }
  count(C_NO_RING);
  return XDP_DROP;
}

SEC("xdp")
int ingress(struct xdp_md *ctx) {
  struct packet p;
  void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
  __u32 zero = 0;
  struct control *c = bpf_map_lookup_elem(&controls, &zero);
  if (!c || !packet_parse(data, end, &p) || p.udp->dest != bpf_htons(port) ||
      !is_for_us(&p, c) || !has_ring(ctx, c)) {
    if (syn_port && c && !syn_admit(data, end, c)) return XDP_DROP;
    count(C_PASSED);
    return XDP_PASS;
  }
  struct lt_header *h = p.header;
  __u32 index = bpf_ntohl(h->tenant), which = bpf_ntohs(h->key);
  struct tenant *t = bpf_map_lookup_elem(&tenants, &index);
  __u32 bytes = bpf_ntohs(p.udp->len);
  if (h->magic != bpf_htons(LT_MAGIC) || !t || !t->ns_per_token_1024 || which > 1 ||
      bytes != sizeof(struct udphdr) + sizeof *h + bpf_ntohs(h->payload_bytes) ||
      (h->type == LT_HELLO && h->payload_bytes)) {
    count(C_BAD_HEADER);
    return XDP_DROP;
  }
  struct place place = place_of(c, h->request, index);
  place_fetch(&place);
  const __u64 *key = t->key[which & 1];
  if (h->mac != header_mac(h, key[0], key[1])) {
    count(C_BAD_MAC);
    return XDP_DROP;
  }
  if (h->type == LT_HELLO) return on_hello(&p, &place, c, t, key);
  if (h->version == LT_VERSION &&
      (h->type == LT_DATA || h->type == LT_ACK || h->type == LT_CANCEL)) {
    return forward(ctx, &p, &place, c);
  }
  count(C_BAD_TYPE);
  return XDP_DROP;
}

char LICENSE[] SEC("license") = "GPL";
