// Owns the memory that the ingress program shares with user space, which maps it and reads and
// writes it with atomic operations: src/net/ingress-maps.ts has the same layout, and a test
// compares the two with the types that the compiled program carries.
#pragma once

#include <linux/bpf.h>
// The helpers need its types.
#include <bpf/bpf_helpers.h>

#include "packet.h"
#include "protocol.h"

#define REPLICAS 16
/** Rings of one replica: one for each receive queue of the interface. */
#define QUEUES 64
/** Of the interface, that the program answers for. */
#define ADDRESSES 16
#define PREFIXES 262144
/** Of the table of requests: as many as have their tags in one cache line. */
#define SLOTS 14
/** Buckets that a request may be in, one behind the other. */
#define PROBES 4

struct tenant {
  /** Two SipHash keys, so that one can be replaced while the other still counts. */
  __u64 key[2][2];
  /** Price of a token in ns / 1024; 0 is a tenant that does not exist. */
  __u64 ns_per_token_1024;
  /** How far ahead of its rate a tenant may be. */
  __u64 burst_ns;
  /** When the bucket will be full again (GCRA's theoretical arrival time), in ktime ns. */
  __u64 full_at_ns;
  __u32 live;
  __u32 live_max;
};

/** By CPU: an atomic operation on a tenant's own line would take longer than the rest of it. */
struct tenant_use {
  __u64 granted;
  __u64 rejected;
  /** Less what user space gave back, which it counts itself. */
  __u64 charged_tokens;
};

struct replica {
  /** 0 is not ready. */
  __u32 ready;
  /** FNV-1a of its model's name. */
  __u32 model;
  __u32 live;
  /** What else it has to do: requests that came over HTTP. */
  __u32 other;
};

struct control {
  __u64 cookie_key[2];
  /** Of the table of requests. */
  __u64 table_key[2];
  /** µs time − ktime / 1000, kept current by user space. */
  __u64 clock_offset_us;
  /** Receive queues that have rings, a bit each; 0 is any. What comes in on others is not ours. */
  __u64 queues;
  /** Those that run, and those that are remembered: taken together, as one word. */
  __u32 live;
  __u32 remembered;
  __u32 live_max;
  __u32 remembered_max;
  /** How many of the following count; with none, datagrams to any address are ours. */
  __u32 addresses;
  /** Those from here on are not ready. */
  __u32 replicas_end;
  /** As they lie in a packet; 0 is none. */
  __u32 address4[ADDRESSES];
  __u64 address6[ADDRESSES][2];
  struct replica replicas[REPLICAS];
};

enum request_state {
  R_ENTERING,
  R_RUNS,
  /** Its number stays taken. */
  R_ENDED,
};

/** What was granted: user space removes it when the request has ended and its window is over. */
struct request {
  __be64 request;
  __u32 tenant;
  /** Set to R_ENDED by user space. */
  __u32 state;
  __u64 granted_ns;
  /** From this ktime on no HELLO for it is in the window: its number may be forgotten. */
  __u64 expires_ns;
  __be64 cookie;
  /** Of the HELLO, to tell a repeat from a reuse. */
  __be64 first_word;
  /** Whose cookie it is: who comes from there needs none to be computed. */
  struct source from;
  __be32 prompt_bytes;
  __be32 max_tokens;
  __be32 model;
  __be32 route;
  __u32 charged_tokens;
  __u32 from_port;
  __u64 spare;
};

/** Two cache lines or more: what is sought, then what is found. */
struct bucket {
  /** Of the slots, from their hash; 0 is a free one. */
  __u32 tags[SLOTS];
  /** Some are in the next bucket. Stays so. */
  __u32 overflowed;
  /** Written to have the line come. */
  __u32 fetched;
  struct request slots[SLOTS];
};

enum counter {
  C_PASSED,
  C_HELLO,
  C_GRANTED,
  C_REPEATED,
  C_REJECTED,
  C_FORWARDED,
  C_BAD_HEADER,
  C_BAD_MAC,
  C_BAD_COOKIE,
  C_BAD_TYPE,
  C_NO_RING,
  C_EVENTS_LOST,
  /** Of a request that was never granted, or DATA of one that has ended. */
  C_STALE,
  /** Connections that were asked for at the watched port, and those of them that were dropped. */
  C_SYN,
  C_SYN_SOURCE,
  C_SYN_TOTAL,
  /** Rejections by code: C_CODE + code − 16. */
  C_CODE = 16,
  COUNTERS = 32,
};

struct counters {
  __u64 count[COUNTERS];
};

struct event {
  __u64 ktime_ns;
  __u64 request;
  __u32 tenant;
  __u32 route;
  __u32 prompt_bytes;
  __u32 max_tokens;
  __u8 type;
  /** GRANT: the same was granted before. */
  __u8 is_repeat;
  __u16 code;
  __u32 retry_ms;
};

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, LT_TENANTS);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, struct tenant);
} tenants SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, 1);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, struct control);
} controls SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_ARRAY);
  __uint(max_entries, PROBES);
  __uint(map_flags, BPF_F_MMAPABLE);
  __type(key, __u32);
  __type(value, struct bucket);
} requests SEC(".maps");

/** Prefix hash (as it comes over the wire) → a bit for each replica that has it in memory. */
struct {
  __uint(type, BPF_MAP_TYPE_HASH);
  __uint(max_entries, PREFIXES);
  __type(key, __be64);
  __type(value, __u64);
} prefixes SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_XSKMAP);
  __uint(max_entries, REPLICAS *QUEUES);
  __type(key, __u32);
  __type(value, __u32);
} rings SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
  __uint(max_entries, 1);
  __type(key, __u32);
  __type(value, struct counters);
} counts SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
  __uint(max_entries, LT_TENANTS);
  __type(key, __u32);
  __type(value, struct tenant_use);
} tenant_uses SEC(".maps");

struct {
  __uint(type, BPF_MAP_TYPE_RINGBUF);
  __uint(max_entries, 1 << 20);
} events SEC(".maps");
