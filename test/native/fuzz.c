// Owns frames of signed nonsense for the native intake under the sanitizers: each lies in memory of
// exactly its size, so that a byte beyond it is noticed. In the end nothing may be left.
//
//   clang-19 -g -O1 -fsanitize=address,undefined test/native/fuzz.c native/{intake,frames,waiting}.c
//   ./a.out SEED FRAMES

#include "../../native/flows.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct lt_intake *lattice_intake_open(uint32_t, uint32_t, double, double);
void lattice_intake_close(struct lt_intake *);
void lattice_intake_key(struct lt_intake *, uint32_t, uint32_t, const uint8_t *);
void lattice_intake_linger(struct lt_intake *, uint32_t, double);
void lattice_intake_read(struct lt_intake *, uint32_t, uint8_t *);
void lattice_intake_step(struct lt_intake *, double, double, const uint8_t *, uint32_t);

#define CHECK(what) \
  if (!(what)) fprintf(stderr, "line %d: %s\n", __LINE__, #what), abort()
/** Answers at once; the rest are over. */
#define LIVE 100

static uint64_t state;
static double now_ms = 1000;
static uint32_t live[LIVE + LT_EVENTS], live_count;
static uint64_t arrived, failed, sent;

static uint64_t any(void) {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

static uint32_t below(uint32_t n) {
  return any() % n;
}

/** A value at which a number changes its meaning, or any. */
static uint64_t odd(void) {
  static const uint64_t edges[] = {0,     1,          2,           63,         64,         65, 255,
                                   65535, 1ull << 31, 0xffffffffu, 1ull << 53, UINT64_MAX,
                                   1u << 26, (1u << 26) + 1};
  return below(3) ? edges[below(sizeof edges / sizeof *edges)] : any();
}

/** Changes a field of a datagram, or a byte of its frame. */
static void spoil(uint8_t *frame, uint32_t bytes, uint32_t udp, uint8_t *data) {
  static const struct { uint8_t at, bytes; } fields[] = {
      {4, 2}, {6, 2}, {8, 4}, {12, 2}, {16, 8}, {40, 4}, {48, 4}, {52, 2},
      {56, 8}, {64, 8}, {72, 8}, {80, 8}};
  uint32_t choice = below(15);
  if (choice < 12) lt_put(data + fields[choice].at, odd(), fields[choice].bytes);
  else if (choice == 12) data[3] = below(12);
  else if (choice == 13) lt_put(frame + udp + 4, odd(), 2);
  else frame[below(bytes)] = any();
}

/** @return its bytes; the frame is allocated */
static uint32_t nonsense(const struct lt_key *key, uint8_t **frame) {
  static const uint32_t sizes[] = {1, 1199, 1200, 1201, 5000, 16384, 16385, 76800, 76801, 200000};
  uint32_t prompt = below(50) ? sizes[below(10)] : 1u << 26;
  uint32_t fragments = (prompt + LT_FRAGMENT_BYTES - 1) / LT_FRAGMENT_BYTES;
  uint32_t fragment = below(below(4) && fragments > 6 ? 6 : fragments);
  uint32_t left = prompt - fragment * LT_FRAGMENT_BYTES, is_data = below(4);
  uint32_t payload = !is_data ? 0 : left < LT_FRAGMENT_BYTES ? left : LT_FRAGMENT_BYTES;
  bool is_ipv6 = below(2);
  uint32_t vlans = below(4), options = is_ipv6 || below(3) ? 0 : 40;
  uint32_t ip = 14 + 4 * vlans, udp = ip + (is_ipv6 ? 40 : 20 + options);
  uint32_t bytes = udp + 8 + sizeof(struct lt_header) + payload;
  uint8_t *f = calloc(1, bytes), *data = f + udp + 8;
  CHECK(f);
  uint32_t at = 12;
  for (uint32_t i = 0; i < vlans; i++, at += 4) lt_put(f + at, 0x8100, 2);
  lt_put(f + at, is_ipv6 ? 0x86dd : 0x0800, 2);
  f[ip] = is_ipv6 ? 0x60 : 0x40 | (20 + options) >> 2;
  lt_put(f + udp + 4, bytes - udp, 2);
  memset(data + sizeof(struct lt_header), fragment, payload);
  lt_put(data, LT_MAGIC, 2);
  data[2] = LT_VERSION;
  data[3] = is_data ? LT_DATA : below(4) ? LT_ACK : LT_CANCEL;
  lt_put(data + 4, payload, 2);
  lt_put(data + 8, below(3), 4);
  lt_put(data + 16, below(600), 8);
  lt_put(data + 40, prompt, 4);
  lt_put(data + 44, 50, 4);
  lt_put(data + 52, fragment, 2);
  uint64_t hash = lt_sip(key, data + sizeof(struct lt_header), payload);
  lt_put(data + 64, is_data ? hash : below(8), 8);
  lt_put(data + 80, 64, 8);
  for (int times = below(3); times > 0; times--) spoil(f, bytes, udp, data);
  if (below(10) == 0) bytes = 1 + below(bytes);
  *frame = realloc(f, bytes);
  CHECK(*frame);
  return bytes;
}

static void hear(struct lt_intake *in) {
  struct lt_news *news = in->news;
  sent += news->out;
  for (uint32_t i = 0; i < news->out; i++) CHECK(news->out_bytes[i] <= LT_OUT_BYTES);
  for (uint32_t i = 0; i < news->events; i++) {
    struct lt_event *event = &news->event[i];
    struct lt_flow *flow = &in->flows[event->flow];
    if (event->kind != LT_ARRIVED && event->kind != LT_FAILED) continue;
    live[live_count++] = event->flow;
    failed += event->kind == LT_FAILED;
    if (event->kind == LT_FAILED) continue;
    arrived++;
    CHECK(flow->arrived_bytes == flow->prompt_bytes);
    uint8_t *prompt = malloc(flow->prompt_bytes);
    CHECK(prompt);
    lattice_intake_read(in, event->flow, prompt);
    free(prompt);
  }
  while (live_count > LIVE) {
    uint32_t i = below(live_count);
    lattice_intake_linger(in, live[i], now_ms + 30000);
    live[i] = live[--live_count];
  }
}

int main(int count, char **words) {
  if (count < 3) return 2;
  state = (strtoull(words[1], NULL, 10) + 1) * 0x9e3779b97f4a7c15ull;
  uint32_t slots = below(2) ? 1 : 64;
  struct lt_intake *in = lattice_intake_open(500, slots, 3e6, 1e6);
  CHECK(in);
  uint8_t secret[16];
  memset(secret, 5, sizeof secret);
  for (int i = 0; i < 8; i++) lattice_intake_key(in, i / 2, i % 2, secret);
  const struct lt_key key = in->keys[0][0];
  for (long i = atol(words[2]); i > 0; i--) {
    uint8_t *frame;
    uint32_t bytes = nonsense(&key, &frame);
    now_ms += below(500) ? below(10) * 0.5 : below(20000);
    lattice_intake_step(in, now_ms, 5, frame, below(4) ? bytes : 0);
    free(frame);
    hear(in);
  }
  // Longer than anything is waited for; all answers end.
  for (int i = 0; i < 2000; i++) {
    while (live_count > 0) lattice_intake_linger(in, live[--live_count], now_ms + 30000);
    now_ms += 100;
    lattice_intake_step(in, now_ms, 5, NULL, 0);
    hear(in);
  }
  struct lt_news *news = in->news;
  CHECK(news->flows == 0 && news->arriving == 0 && news->arriving_bytes == 0);
  CHECK(in->waiting == 0 && in->free_count == slots);
  lattice_intake_close(in);
  printf("%lu arrived, %lu failed, %lu frames sent\n", arrived, failed, sent);
}
