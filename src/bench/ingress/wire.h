// Owns what the clients of the bench have in common: clocks, what was measured, and the protocol's
// hash (docs/protocol.md). In C, so that what is measured is the kernel's path.
#pragma once

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HELLO_BYTES 96

static void die(const char *what) {
  fprintf(stderr, "%s: %s\n", what, strerror(errno));
  exit(1);
}

static inline uint64_t now_ns(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return t.tv_sec * 1000000000ull + t.tv_nsec;
}

// --- What was measured -------------------------------------------------------------------------

static uint64_t *samples;
static long taken;

static inline int ascending(const void *a, const void *b) {
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return x < y ? -1 : x > y;
}

static inline void report(uint64_t wall, uint64_t cpu, long answers, const long *types) {
  qsort(samples, taken, sizeof *samples, ascending);
#define AT(q) (taken ? samples[(long)((taken - 1) * (q))] / 1e3 : 0)
  printf("{\"count\":%ld,\"p50_us\":%.2f,\"p90_us\":%.2f,\"p99_us\":%.2f,\"p999_us\":%.2f,"
         "\"max_us\":%.2f,\"wall_ns\":%.0f,\"cpu_ns\":%.0f,\"grants\":%ld,\"rejects\":%ld}\n",
         answers, AT(.5), AT(.9), AT(.99), AT(.999), AT(1), (double)wall / answers,
         (double)cpu / answers, types[2], types[3]);
}

/** Waits for a request's turn: spinning to the end, or asleep. */
static inline void wait_turn(uint64_t start, long i, double rate, int spins) {
  if (rate <= 0) return;
  uint64_t at = start + (uint64_t)(i * 1e9 / rate);
  if (!spins) {
    struct timespec t = {at / 1000000000, at % 1000000000};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, 0);
    return;
  }
  while (now_ns(CLOCK_MONOTONIC) < at);
}

// --- The protocol: docs/protocol.md -------------------------------------------------------------

#define ROTATE(x, b) (((x) << (b)) | ((x) >> (64 - (b))))

static uint64_t sip(const uint8_t *key, const uint8_t *in, size_t bytes) {
  uint64_t k[2], v0, v1, v2, v3, word;
  memcpy(k, key, 16);
  v0 = k[0] ^ 0x736f6d6570736575ull;
  v1 = k[1] ^ 0x646f72616e646f6dull;
  v2 = k[0] ^ 0x6c7967656e657261ull;
  v3 = k[1] ^ 0x7465646279746573ull;
#define ROUND                                                                                     \
  v0 += v1, v2 += v3, v1 = ROTATE(v1, 13) ^ v0, v3 = ROTATE(v3, 16) ^ v2, v0 = ROTATE(v0, 32),    \
      v2 += v1, v0 += v3, v1 = ROTATE(v1, 17) ^ v2, v3 = ROTATE(v3, 21) ^ v0, v2 = ROTATE(v2, 32)
  size_t at = 0;
  for (; at + 8 <= bytes; at += 8) {
    memcpy(&word, in + at, 8);
    v3 ^= word, ROUND, ROUND, v0 ^= word;
  }
  word = (uint64_t)bytes << 56;
  for (size_t i = at; i < bytes; i++) word |= (uint64_t)in[i] << 8 * (i - at);
  v3 ^= word, ROUND, ROUND, v0 ^= word;
  v2 ^= 0xff, ROUND, ROUND, ROUND, ROUND;
  return v0 ^ v1 ^ v2 ^ v3;
}

static inline uint64_t get(const uint8_t *at, int bytes) {
  uint64_t value = 0;
  for (int i = 0; i < bytes; i++) value = value << 8 | at[i];
  return value;
}

static void put(uint8_t *at, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; i++) at[i] = value >> 8 * (bytes - 1 - i);
}
