// Owns prompts on their way in: which request a datagram belongs to, what of its prompt is there,
// what is acknowledged, and who has been silent for too long. src/net/intake.ts does the same, and
// docs/protocol.md says the rules. No I/O and no clock: tables of fixed size, and memory for
// prompts within limits.

#include "flows.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define ACK_EVERY 16
#define ACK_MS 10
#define AHEAD 64
#define ARRIVAL_MS 10000
#define SILENCE_MS 15000
#define LINGER_MS 4000
/** The server keeps a place for who is not claimed within 10 s. */
#define CLAIM_MS 500
#define FIRST_BYTES (64 * LT_FRAGMENT_BYTES)
#define FLAG_RETRY 4
/** Said by END besides those that the program says. */
#define CODE_CANCELLED 2
#define CODE_TIMED_OUT 3

#define FIELD(data, name) \
  lt_get((data) + offsetof(struct lt_header, name), sizeof(((struct lt_header *)0)->name))
#define WORD(data, i) lt_get((data) + offsetof(struct lt_header, word) + 8 * (i), 8)
#define PUT(data, name, value) \
  lt_put((data) + offsetof(struct lt_header, name), value, sizeof(((struct lt_header *)0)->name))

static double least(double a, double b) {
  return a < b ? a : b;
}

// --- Memory --------------------------------------------------------------------------------------

static bool is_in_slot(const struct lt_intake *in, const uint8_t *prompt) {
  return prompt >= in->slots && prompt < in->slots + (size_t)in->slot_count * LT_SLOT_BYTES;
}

static uint8_t *allocate(struct lt_intake *in, uint32_t bytes) {
  if (bytes > LT_SLOT_BYTES || in->free_count == 0) return malloc(bytes);
  return in->slots + (size_t)in->free_slots[--in->free_count] * LT_SLOT_BYTES;
}

static void release(struct lt_intake *in, uint8_t *prompt) {
  if (!is_in_slot(in, prompt)) free(prompt);
  else in->free_slots[in->free_count++] = (prompt - in->slots) / LT_SLOT_BYTES;
}

static void give_back(struct lt_intake *in, uint32_t tenant, uint32_t bytes) {
  in->news->arriving_bytes -= bytes;
  in->bytes_of[tenant] -= bytes;
}

/** What has not arrived takes no memory: else a few datagrams could take it all. */
static enum lt_code make_room(struct lt_intake *in, struct lt_flow *f, uint32_t bytes) {
  if (bytes <= f->room) return LT_OK;
  uint32_t wanted = 2 * f->room > FIRST_BYTES ? 2 * f->room : FIRST_BYTES;
  if (wanted < bytes) wanted = bytes;
  if (wanted > f->prompt_bytes) wanted = f->prompt_bytes;
  uint32_t more = wanted - f->room;
  if (in->bytes_of[f->tenant] + more > in->bytes_max_of_tenant) return LT_CODE_TENANT_BUSY;
  if (in->news->arriving_bytes + more > in->bytes_max) return LT_CODE_BUSY;
  uint8_t *prompt = allocate(in, wanted);
  if (!prompt) return LT_CODE_BUSY;
  if (f->prompt) {
    memcpy(prompt, f->prompt, f->room);
    release(in, f->prompt);
  }
  f->prompt = prompt;
  f->room = wanted;
  in->news->arriving_bytes += more;
  in->bytes_of[f->tenant] += more;
  return LT_OK;
}

static void drop_prompt(struct lt_intake *in, struct lt_flow *f) {
  if (f->prompt) release(in, f->prompt);
  f->prompt = NULL;
}

// --- Flows ---------------------------------------------------------------------------------------

static uint32_t *bucket_of(struct lt_intake *in, uint32_t tenant, uint64_t request) {
  uint64_t mixed = (request ^ (uint64_t)tenant << 40) * 0x9e3779b97f4a7c15ull;
  return &in->buckets[(mixed ^ mixed >> 32) & in->mask];
}

static uint32_t find(struct lt_intake *in, uint32_t tenant, uint64_t request) {
  uint32_t id = *bucket_of(in, tenant, request);
  while (id != LT_NOBODY) {
    struct lt_flow *f = &in->flows[id];
    if (f->request == request && f->tenant == tenant) break;
    id = f->next;
  }
  return id;
}

/** LT_NOBODY for what comes late after the end, or answers nothing. */
static uint32_t open(struct lt_intake *in, const uint8_t *frame, const struct lt_layout *layout) {
  const uint8_t *data = frame + layout->data;
  uint32_t type = FIELD(data, type), bytes = FIELD(data, prompt_bytes);
  uint32_t tenant = FIELD(data, tenant), key = FIELD(data, key);
  // CANCEL may come before any DATA.
  if (type != LT_DATA && type != LT_CANCEL) return LT_NOBODY;
  if (bytes == 0 || bytes > LT_PROMPT_BYTES_MAX) return LT_NOBODY;
  if (tenant >= LT_TENANTS || key > 1 || !in->keys[tenant][key].is_known) return LT_NOBODY;
  uint32_t id = in->free;
  if (id != LT_NOBODY) in->free = in->flows[id].next;
  else if (in->used < in->most) id = ++in->used;
  else {
    in->news->refused++;
    return LT_NOBODY;
  }
  struct lt_flow *f = &in->flows[id];
  uint32_t deadline_ms = FIELD(data, deadline_ms);
  uint64_t request = FIELD(data, request);
  uint32_t *bucket = bucket_of(in, tenant, request);
  double now = in->news->now_ms;
  *f = (struct lt_flow){
      .request = request,
      .cookie = WORD(data, 0),
      .sampling = WORD(data, 2),
      .seed = WORD(data, 3),
      .heard_ms = now,
      .due_ms = deadline_ms == 0 ? LT_NEVER : now + deadline_ms,
      .tenant = tenant,
      .route = FIELD(data, route),
      .max_tokens = FIELD(data, max_tokens),
      .prompt_bytes = bytes,
      .credit = AHEAD,
      .key = key,
      .flags = FIELD(data, flags),
      .state = LT_ARRIVING,
      .opened_ms = now,
      .fragments = (bytes + LT_FRAGMENT_BYTES - 1) / LT_FRAGMENT_BYTES,
      .next = *bucket,
      .heap_at = LT_NONE,
  };
  lt_keep_head(f, frame, layout);
  *bucket = id;
  in->news->flows++;
  in->news->arriving++;
  return id;
}

static void forget(struct lt_intake *in, uint32_t id) {
  struct lt_flow *f = &in->flows[id];
  lt_await(in, id, LT_NEVER);
  drop_prompt(in, f);
  uint32_t *at = bucket_of(in, f->tenant, f->request);
  while (*at != id) at = &in->flows[*at].next;
  *at = f->next;
  f->state = LT_FREE;
  f->next = in->free;
  in->free = id;
  in->news->flows--;
}

static struct lt_event *tell(struct lt_intake *in, enum lt_event_kind kind, uint32_t id) {
  struct lt_event *event = &in->news->event[in->news->events++];
  *event = (struct lt_event){.kind = kind, .flow = id};
  return event;
}

/** From now on TypeScript says how it goes on. */
static struct lt_event *hand_over(struct lt_intake *in, uint32_t id, enum lt_event_kind kind) {
  struct lt_flow *f = &in->flows[id];
  f->state = LT_HANDED;
  in->news->arriving--;
  give_back(in, f->tenant, f->room);
  struct lt_event *event = tell(in, kind, id);
  event->is_claim = !f->is_claimed;
  return event;
}

static void fail(struct lt_intake *in, uint32_t id, uint32_t code) {
  drop_prompt(in, &in->flows[id]);
  hand_over(in, id, LT_FAILED)->value = code;
}

/** Its answer is not wanted any more; said once. */
static void stop(struct lt_intake *in, uint32_t id, uint32_t code) {
  if (in->flows[id].is_stopped) return;
  in->flows[id].is_stopped = true;
  tell(in, LT_STOPPED, id)->value = code;
}

// --- What is said of what has arrived ------------------------------------------------------------

static double ack_ms(const struct lt_flow *f) {
  if (f->unsaid == 0) return LT_NEVER;
  return f->is_urgent || f->unsaid >= ACK_EVERY ? f->unsaid_ms : f->unsaid_ms + ACK_MS;
}

static void acknowledge(struct lt_intake *in, struct lt_flow *f) {
  uint8_t *frame = in->out[in->news->out], *data = frame + f->head_bytes;
  memset(data, 0, sizeof(struct lt_header));
  PUT(data, magic, LT_MAGIC);
  PUT(data, version, LT_VERSION);
  PUT(data, type, LT_ACK);
  PUT(data, tenant, f->tenant);
  PUT(data, key, f->key);
  PUT(data, request, f->request);
  PUT(data, time_us, in->time_us);
  PUT(data, route, f->route);
  PUT(data, word[0], f->cookie);
  PUT(data, word[1], f->first_missing);
  PUT(data, word[2], f->early);
  PUT(data, word[3], AHEAD);
  PUT(data, mac, lt_sip(&in->keys[f->tenant][f->key], data, offsetof(struct lt_header, mac)));
  in->news->out_bytes[in->news->out++] = lt_seal(f, frame, sizeof(struct lt_header));
  f->unsaid = 0;
  f->is_urgent = false;
}

/** False if it came before, or is further ahead than any sender may be. */
static bool is_new(struct lt_flow *f, uint32_t fragment, double now) {
  if (f->unsaid++ == 0) f->unsaid_ms = now;
  if (fragment > f->first_missing + AHEAD) return false;
  if (fragment == f->first_missing) {
    bool is_there;
    do {
      is_there = f->early & 1;
      f->early >>= 1;
      f->first_missing++;
    } while (is_there);
    return true;
  }
  // Out of order, or its ACK was lost.
  f->is_urgent = true;
  if (fragment < f->first_missing) return false;
  uint64_t bit = 1ull << (fragment - f->first_missing - 1);
  if (f->early & bit) return false;
  f->early |= bit;
  return true;
}

static void take_data(struct lt_intake *in, uint32_t id, const uint8_t *data, uint32_t bytes) {
  struct lt_flow *f = &in->flows[id];
  uint32_t fragment = FIELD(data, fragment), from = fragment * LT_FRAGMENT_BYTES;
  if (fragment >= f->fragments) return;
  uint32_t left = f->prompt_bytes - from;
  uint32_t payload_bytes = bytes - sizeof(struct lt_header);
  if (payload_bytes != (left < LT_FRAGMENT_BYTES ? left : LT_FRAGMENT_BYTES)) return;
  const uint8_t *payload = data + sizeof(struct lt_header);
  if (lt_sip(&in->keys[f->tenant][f->key], payload, payload_bytes) != WORD(data, 1)) return;
  if (!is_new(f, fragment, in->news->now_ms) || f->state != LT_ARRIVING) return;
  enum lt_code refused = make_room(in, f, from + payload_bytes);
  if (refused != LT_OK) {
    fail(in, id, refused);
    return;
  }
  memcpy(f->prompt + from, payload, payload_bytes);
  f->arrived_bytes += payload_bytes;
  if (f->first_missing < f->fragments) return;
  if (f->is_urgent) in->is_awaited = true;
  acknowledge(in, f);
  bool is_seen = is_in_slot(in, f->prompt);
  hand_over(in, id, LT_ARRIVED)->value = is_seen ? f->prompt - in->slots : LT_NONE;
}

static void take_ack(struct lt_intake *in, uint32_t id, const uint8_t *data) {
  struct lt_flow *f = &in->flows[id];
  uint64_t first_missing = WORD(data, 1), credit = WORD(data, 3);
  // More than anything that is ever sent is as good as any other number.
  f->credit = credit < UINT32_MAX ? credit : UINT32_MAX;
  if (FIELD(data, flags) & FLAG_RETRY) {
    if (f->unsaid++ == 0) f->unsaid_ms = in->news->now_ms;
    f->is_urgent = true;
  }
  if (f->state != LT_HANDED) return;
  struct lt_event *event = tell(in, LT_ACKNOWLEDGED, id);
  event->first_missing = first_missing < UINT32_MAX ? first_missing : UINT32_MAX;
  event->credit = f->credit;
  event->bitmap = WORD(data, 2);
}

/** What it waits for from now on. */
static void go_on(struct lt_intake *in, uint32_t id) {
  struct lt_flow *f = &in->flows[id];
  double next = ack_ms(f);
  if (f->state == LT_ARRIVING) {
    next = least(next, least(f->due_ms, f->heard_ms + ARRIVAL_MS + 1));
    if (!f->is_claimed) next = least(next, f->opened_ms + CLAIM_MS);
  } else if (f->state == LT_HANDED && !f->is_stopped) {
    next = least(next, least(f->due_ms, f->heard_ms + SILENCE_MS + 1));
  } else if (f->state == LT_LINGERING) {
    next = least(next, least(f->until_ms + 1, f->heard_ms + LINGER_MS + 1));
  }
  lt_await(in, id, next);
}

/** There is room for a frame to send and an event. */
void lt_intake_take(struct lt_intake *in, const uint8_t *frame, uint32_t bytes) {
  struct lt_layout layout;
  if (!lt_layout_of(frame, bytes, &layout)) return;
  const uint8_t *data = frame + layout.data;
  if (FIELD(data, magic) != LT_MAGIC) return;
  if (layout.data_bytes != sizeof(struct lt_header) + FIELD(data, payload_bytes)) return;
  uint32_t id = find(in, FIELD(data, tenant), FIELD(data, request));
  if (id == LT_NOBODY) id = open(in, frame, &layout);
  if (id == LT_NOBODY) return;
  struct lt_flow *f = &in->flows[id];
  f->heard_ms = in->news->now_ms;
  uint32_t type = FIELD(data, type);
  if (type == LT_DATA) take_data(in, id, data, layout.data_bytes);
  else if (type == LT_ACK) take_ack(in, id, data);
  else if (type == LT_CANCEL && f->state == LT_ARRIVING) fail(in, id, CODE_CANCELLED);
  else if (type == LT_CANCEL && f->state == LT_HANDED) stop(in, id, CODE_CANCELLED);
  go_on(in, id);
}

bool lt_intake_turn(struct lt_intake *in) {
  struct lt_news *news = in->news;
  while (in->waiting > 0 && in->heap[0].at_ms <= news->now_ms) {
    if (news->out == LT_OUT || news->events == LT_EVENTS) break;
    uint32_t id = in->heap[0].flow;
    struct lt_flow *f = &in->flows[id];
    double now = news->now_ms;
    if (f->state == LT_LINGERING && (now - f->heard_ms > LINGER_MS || now > f->until_ms)) {
      forget(in, id);
      continue;
    }
    if (ack_ms(f) <= now) {
      in->is_awaited = true;
      acknowledge(in, f);
    }
    bool is_late = now >= f->due_ms;
    double silent_ms = now - f->heard_ms;
    if (f->state == LT_HANDED && is_late) stop(in, id, CODE_TIMED_OUT);
    else if (f->state == LT_HANDED && silent_ms > SILENCE_MS) stop(in, id, CODE_CANCELLED);
    else if (f->state == LT_ARRIVING) {
      if (is_late || silent_ms > ARRIVAL_MS) fail(in, id, CODE_TIMED_OUT);
      else if (!f->is_claimed && now >= f->opened_ms + CLAIM_MS) {
        f->is_claimed = true;
        tell(in, LT_CLAIMED, id);
      }
    }
    go_on(in, id);
  }
  news->next_ms = in->waiting > 0 ? in->heap[0].at_ms : LT_NEVER;
  return news->out < LT_OUT || news->next_ms > news->now_ms;
}

void lt_intake_heard(struct lt_intake *in) {
  for (uint32_t i = 0; i < in->news->events; i++) {
    struct lt_event *event = &in->news->event[i];
    if (event->kind == LT_ARRIVED) drop_prompt(in, &in->flows[event->flow]);
  }
  in->news->events = 0;
}

// --- What TypeScript calls -----------------------------------------------------------------------

static void *map(size_t bytes) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  return at == MAP_FAILED ? NULL : at;
}

static size_t buckets_for(uint32_t flows) {
  size_t count = 1;
  while (count < flows) count *= 2;
  return count;
}

LT_API void lattice_intake_close(struct lt_intake *in) {
  for (uint32_t i = 1; i <= in->used; i++) {
    uint8_t *prompt = in->flows[i].prompt;
    if (prompt && !is_in_slot(in, prompt)) free(prompt);
  }
  if (in->news) munmap(in->news, sizeof *in->news);
  if (in->flows) munmap(in->flows, ((size_t)in->most + 1) * sizeof *in->flows);
  if (in->buckets) munmap(in->buckets, ((size_t)in->mask + 1) * sizeof *in->buckets);
  if (in->heap) munmap(in->heap, (size_t)in->most * sizeof *in->heap);
  if (in->slots) munmap(in->slots, (size_t)in->slot_count * LT_SLOT_BYTES);
  if (in->out) munmap(in->out, LT_OUT * LT_OUT_BYTES);
  free(in->free_slots);
  free(in);
}

/** @return NULL if there is no memory */
LT_API struct lt_intake *lattice_intake_open(uint32_t flows, uint32_t slots, double bytes_max,
                                             double bytes_max_of_tenant) {
  struct lt_intake *in = calloc(1, sizeof *in);
  if (!in) return NULL;
  in->most = flows;
  in->mask = buckets_for(flows) - 1;
  in->slot_count = slots;
  in->bytes_max = bytes_max;
  in->bytes_max_of_tenant = bytes_max_of_tenant;
  in->news = map(sizeof *in->news);
  in->flows = map(((size_t)flows + 1) * sizeof *in->flows);
  in->buckets = map(((size_t)in->mask + 1) * sizeof *in->buckets);
  in->heap = map((size_t)flows * sizeof *in->heap);
  in->slots = map((size_t)slots * LT_SLOT_BYTES);
  in->out = map(LT_OUT * LT_OUT_BYTES);
  in->free_slots = calloc(slots, sizeof *in->free_slots);
  if (!in->news || !in->flows || !in->buckets || !in->heap || !in->slots || !in->out ||
      !in->free_slots) {
    lattice_intake_close(in);
    return NULL;
  }
  for (uint32_t i = slots; i-- > 0;) in->free_slots[in->free_count++] = i;
  return in;
}

/** @param bytes 16 of them */
LT_API void lattice_intake_key(struct lt_intake *in, uint32_t tenant, uint32_t which,
                               const uint8_t *bytes) {
  if (tenant >= LT_TENANTS || which > 1) return;
  struct lt_key *key = &in->keys[tenant][which];
  memcpy(&key->k0, bytes, 8);
  memcpy(&key->k1, bytes + 8, 8);
  key->is_known = true;
}

/** Where what TypeScript reads lies: the news, the flows, the slots, the frames to send. */
LT_API void lattice_intake_places(struct lt_intake *in, uint64_t places[4]) {
  places[0] = (uintptr_t)in->news;
  places[1] = (uintptr_t)in->flows;
  places[2] = (uintptr_t)in->slots;
  places[3] = (uintptr_t)in->out;
}

/** A prompt that has arrived and lies in no slot; until the next frame is taken. */
LT_API void lattice_intake_read(struct lt_intake *in, uint32_t id, uint8_t *to) {
  struct lt_flow *f = &in->flows[id];
  if (f->prompt) memcpy(to, f->prompt, f->prompt_bytes);
}

/** The answer is over: late repeats are still acknowledged. */
LT_API void lattice_intake_linger(struct lt_intake *in, uint32_t id, double until_ms) {
  struct lt_flow *f = &in->flows[id];
  if (f->state != LT_HANDED) return;
  f->state = LT_LINGERING;
  f->until_ms = until_ms;
  go_on(in, id);
}

/** A frame by hand; with none, time passes. Frames to send are in their place afterwards. */
LT_API void lattice_intake_step(struct lt_intake *in, double now_ms, double time_us,
                                const uint8_t *frame, uint32_t bytes) {
  lt_intake_heard(in);
  in->news->out = 0;
  in->news->now_ms = now_ms;
  in->time_us = time_us;
  if (bytes > 0) lt_intake_take(in, frame, bytes);
  else lt_intake_turn(in);
  in->news->next_ms = in->waiting > 0 ? in->heap[0].at_ms : LT_NEVER;
}
