// Owns what the parts of the native ring share: prompts on their way in, frames, and the layout of
// what TypeScript reads of them (src/ffi/native-ring.ts has the same offsets).
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../bpf/protocol.h"

/** TypeScript calls it. */
#define LT_API __attribute__((visibility("default")))

#define LT_NONE UINT32_MAX
/** Flows are numbered from 1, so that tables begin as memory does. */
#define LT_NOBODY 0
#define LT_NEVER __builtin_inf()
#define LT_EVENTS 1024
/** Frames that wait to be sent: one system call takes them all. */
#define LT_OUT 64
#define LT_OUT_BYTES 256
/** Ethernet, two VLAN tags, IPv4 with options or IPv6, UDP. */
#define LT_HEAD_MAX 96
/** Prompts of up to so many bytes lie in memory that TypeScript sees. */
#define LT_SLOT_BYTES 16384

enum lt_state { LT_FREE, LT_ARRIVING, LT_HANDED, LT_LINGERING };

struct lt_flow {
  // What its first datagram said.
  uint64_t request, cookie, sampling, seed;
  double heard_ms, due_ms;
  uint32_t tenant, route, max_tokens, prompt_bytes;
  uint32_t arrived_bytes, credit;
  uint16_t key, flags;
  /** Of `head`; where IP begins in it, and its version. */
  uint8_t head_bytes, ip, version, state;
  /** What precedes a datagram back to the client, but for lengths and sums. */
  uint8_t head[LT_HEAD_MAX];

  // What TypeScript does not read.
  uint64_t early;
  double unsaid_ms, opened_ms, until_ms;
  /** In a slot, or allocated. */
  uint8_t *prompt;
  uint32_t room, fragments, first_missing, unsaid;
  /** In its bucket, or in the list of free ones; its place in the heap. */
  uint32_t next, heap_at;
  bool is_urgent, is_claimed, is_stopped;
} __attribute__((aligned(64)));

_Static_assert(offsetof(struct lt_flow, tenant) == 48, "src/ffi/native-ring.ts");
_Static_assert(offsetof(struct lt_flow, key) == 72, "src/ffi/native-ring.ts");
_Static_assert(offsetof(struct lt_flow, head) == 80, "src/ffi/native-ring.ts");
_Static_assert(sizeof(struct lt_flow) == 256, "src/ffi/native-ring.ts");

enum lt_event_kind { LT_CLAIMED = 1, LT_ARRIVED, LT_FAILED, LT_ACKNOWLEDGED, LT_STOPPED };

struct lt_event {
  uint32_t kind, flow;
  /** FAILED, STOPPED: a code. ARRIVED: where the prompt lies in the slots, or LT_NONE. */
  uint32_t value;
  uint32_t first_missing, credit;
  /** ARRIVED, FAILED: it was not told before that it is claimed. */
  uint32_t is_claim;
  uint64_t bitmap;
};

_Static_assert(sizeof(struct lt_event) == 32, "src/ffi/native-ring.ts");

/** What TypeScript reads after each call. */
struct lt_news {
  double now_ms, next_ms;
  /** Flows there are, those whose prompt is not complete, and the memory of these. */
  uint32_t events, out, flows, arriving;
  uint64_t arriving_bytes;
  /** Frames for which there was no flow left, and those that could not be sent. */
  uint64_t refused, unsent;
  uint32_t out_bytes[LT_OUT];
  struct lt_event event[LT_EVENTS];
};

_Static_assert(offsetof(struct lt_news, event) == 312, "src/ffi/native-ring.ts");

struct lt_key {
  uint64_t k0, k1;
  bool is_known;
};

struct lt_due {
  double at_ms;
  uint32_t flow;
};

struct lt_intake {
  struct lt_news *news;
  struct lt_flow *flows;
  /** Flows there may be, and have been at once; those that are free again. */
  uint32_t most, used, free, mask;
  uint32_t *buckets;
  /** A binary heap by time of the flows that wait for one. */
  struct lt_due *heap;
  uint32_t waiting;
  uint8_t *slots;
  uint32_t slot_count, free_count, *free_slots;
  uint64_t bytes_max, bytes_max_of_tenant;
  uint64_t time_us;
  /** Somebody waits for what is to be sent: it is not only that a prompt is complete. */
  bool is_awaited;
  uint8_t (*out)[LT_OUT_BYTES];
  uint64_t bytes_of[LT_TENANTS];
  struct lt_key keys[LT_TENANTS][2];
};

/** Where things lie in a frame. */
struct lt_layout {
  uint32_t ip, udp, data, data_bytes;
  uint8_t version;
};

static inline uint64_t lt_get(const uint8_t *at, int bytes) {
  uint64_t value = 0;
  for (int i = 0; i < bytes; i++) value = value << 8 | at[i];
  return value;
}

static inline void lt_put(uint8_t *at, uint64_t value, int bytes) {
  for (int i = bytes - 1; i >= 0; i--, value >>= 8) at[i] = (uint8_t)value;
}

bool lt_layout_of(const uint8_t *frame, uint32_t bytes, struct lt_layout *layout);
void lt_keep_head(struct lt_flow *flow, const uint8_t *frame, const struct lt_layout *layout);
/** Completes a frame whose datagram lies behind the head. Returns its bytes. */
uint32_t lt_seal(const struct lt_flow *flow, uint8_t *frame, uint32_t data_bytes);
uint64_t lt_sip(const struct lt_key *key, const uint8_t *data, size_t bytes);

/** @param at_ms when it is a flow's turn; LT_NEVER if it waits for nothing */
void lt_await(struct lt_intake *in, uint32_t id, double at_ms);

void lt_intake_take(struct lt_intake *in, const uint8_t *frame, uint32_t bytes);
/** What is due; false if frames have to be sent first, because there is no room for more. */
bool lt_intake_turn(struct lt_intake *in);
/** What was told is read. */
void lt_intake_heard(struct lt_intake *in);
