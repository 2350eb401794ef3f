// Owns the loop between the kernel and the tables of prompts: it takes frames from AF_XDP rings and
// sends what is to be said of them, and sleeps until there is something for TypeScript.
//
// src/ffi/xdp-socket.ts opens the sockets and says what their rings are.

#define _GNU_SOURCE
#include "flows.h"

#include <linux/if_xdp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SOCKETS_MAX 64
/** Frames of a socket before another one, and time, have their turn. */
#define BURST 256
/** With busy-polling: so long after the last frame the driver is asked again and again. */
#define BUSY_MS 2
/** Whatever comes in, others are heard so often. */
#define HOLD_MS 2
/**
 * That a prompt is complete need not be said at once: the protocol lets it wait for 10 ms or 16
 * datagrams. So it waits for others where prompts follow each other so closely, and costs a third.
 */
#define CLOSE_MS 4
#define GATHER_MS 5
#define GATHER_MS_MAX 8
#define GATHER_FRAMES 12

struct lt_socket {
  uint64_t fd, frames, frame_bytes;
  uint8_t *memory;
  /** Of the receive ring: producer, consumer, entries. Of the fill ring: and its flags. */
  uint32_t *rx_producer, *rx_consumer;
  struct xdp_desc *rx;
  uint32_t *fill_producer, *fill_flags;
  uint64_t *fill;
};

struct lt_ring {
  struct lt_intake *in;
  int out_fd, busy;
  uint32_t sockets;
  double busy_until_ms;
  /** When the first of what is to be sent was written, and the last of all. */
  double gathered_ms, written_ms;
  struct lt_socket socket[SOCKETS_MAX];
  /** The bell first. */
  struct pollfd polled[1 + SOCKETS_MAX];
  struct mmsghdr message[LT_OUT];
  struct iovec part[LT_OUT];
};

static double clock_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static uint64_t clock_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  return t.tv_sec * 1000000ull + t.tv_nsec / 1000;
}

/** As on any network, a frame may be lost: the first that is left if none could be sent. */
static void flush(struct lt_ring *r) {
  struct lt_news *news = r->in->news;
  for (uint32_t i = 0; i < news->out; i++) r->part[i].iov_len = news->out_bytes[i];
  for (uint32_t from = 0; from < news->out;) {
    int sent = sendmmsg(r->out_fd, r->message + from, news->out - from, 0);
    if (sent <= 0) news->unsent++;
    from += sent > 0 ? sent : 1;
  }
  news->out = 0;
  r->in->is_awaited = false;
  r->gathered_ms = LT_NEVER;
}

/**
 * Sends, unless more is likely to come.
 * @param before how much there was to send before this turn
 */
static void flush_or_gather(struct lt_ring *r, uint32_t before) {
  uint32_t out = r->in->news->out;
  double now = r->in->news->now_ms;
  if (out == 0) return;
  if (r->gathered_ms == LT_NEVER) r->gathered_ms = now;
  if (out != before) {
    if (now - r->written_ms > CLOSE_MS) r->in->is_awaited = true;
    r->written_ms = now;
  }
  bool is_enough = out >= GATHER_FRAMES || now - r->gathered_ms >= GATHER_MS;
  if (is_enough || r->in->is_awaited) flush(r);
}

static void wake(const struct lt_socket *s) {
  recvfrom(s->fd, NULL, 0, MSG_DONTWAIT, NULL, NULL);
}

/** Returns how many frames there were. */
static uint32_t receive(struct lt_ring *r, struct lt_socket *s) {
  uint32_t from = *s->rx_consumer;
  uint32_t there = __atomic_load_n(s->rx_producer, __ATOMIC_ACQUIRE) - from;
  uint32_t count = there < BURST ? there : BURST, mask = s->frames - 1;
  uint32_t filled = *s->fill_producer;
  uint64_t memory_bytes = 2 * s->frames * s->frame_bytes;
  uint32_t i = 0;
  for (; i < count && r->in->news->events < LT_EVENTS; i++) {
    const struct xdp_desc *frame = &s->rx[(from + i) & mask];
    uint64_t at = frame->addr, bytes = frame->len;
    if (at < memory_bytes && bytes <= memory_bytes - at) {
      if (r->in->news->out == LT_OUT) flush(r);
      lt_intake_take(r->in, s->memory + at, bytes);
    }
    s->fill[(filled + i) & mask] = at - at % s->frame_bytes;
  }
  if (i > 0) {
    __atomic_store_n(s->rx_consumer, from + i, __ATOMIC_RELEASE);
    __atomic_store_n(s->fill_producer, filled + i, __ATOMIC_RELEASE);
  }
  if (__atomic_load_n(s->fill_flags, __ATOMIC_RELAXED) & XDP_RING_NEED_WAKEUP) wake(s);
  return i;
}

static uint32_t receive_all(struct lt_ring *r) {
  uint32_t taken = 0, before = r->in->news->out;
  r->in->news->now_ms = clock_ms();
  r->in->time_us = clock_us();
  for (uint32_t i = 0; i < r->sockets; i++) taken += receive(r, &r->socket[i]);
  while (!lt_intake_turn(r->in)) flush(r);
  flush_or_gather(r, before);
  return taken;
}

/** Whether the bell has rung. */
static bool sleep_until(struct lt_ring *r, double until_ms) {
  double ms = until_ms - r->in->news->now_ms;
  if (ms < 0) ms = 0;
  if (ms > 1e6) ms = 1e6;
  struct timespec timeout = {ms / 1e3, (long)(ms * 1e6) % 1000000000};
  if (ppoll(r->polled, 1 + r->sockets, &timeout, NULL) <= 0) return false;
  if (!r->polled[0].revents) return false;
  uint64_t count;
  return read(r->polled[0].fd, &count, sizeof count) > 0;
}

// --- What TypeScript calls -----------------------------------------------------------------------

/** @param out_fd a packet socket */
LT_API struct lt_ring *lattice_ring_open(struct lt_intake *in, int bell, int out_fd, int busy) {
  struct lt_ring *r = calloc(1, sizeof *r);
  if (!r) return NULL;
  r->in = in;
  r->out_fd = out_fd;
  r->busy = busy;
  r->gathered_ms = LT_NEVER;
  r->polled[0] = (struct pollfd){.fd = bell, .events = POLLIN};
  for (int i = 0; i < LT_OUT; i++) {
    r->part[i].iov_base = in->out[i];
    r->message[i].msg_hdr = (struct msghdr){.msg_iov = &r->part[i], .msg_iovlen = 1};
  }
  return r;
}

LT_API void lattice_ring_close(struct lt_ring *r) {
  free(r);
}

/** @param words struct lt_socket. False if there are as many as may be. */
LT_API bool lattice_ring_add(struct lt_ring *r, const uint64_t *words) {
  if (r->sockets == SOCKETS_MAX) return false;
  struct lt_socket *s = &r->socket[r->sockets++];
  memcpy(s, words, sizeof *s);
  r->polled[r->sockets] = (struct pollfd){.fd = s->fd, .events = POLLIN};
  return true;
}

/** The clock of all times here. */
LT_API double lattice_ring_now(void) {
  return clock_ms();
}

/**
 * Takes what is there, and sleeps until something is to be told, the bell has rung, or it is time.
 * What was told before is read.
 */
LT_API void lattice_ring_wait(struct lt_ring *r, double until_ms) {
  struct lt_news *news = r->in->news;
  lt_intake_heard(r->in);
  double hold_ms = clock_ms() + HOLD_MS;
  for (;;) {
    uint32_t taken = receive_all(r);
    double now = news->now_ms;
    if (news->events > 0 || now >= until_ms) return;
    if (taken > 0) {
      r->busy_until_ms = now + BUSY_MS;
      if (now >= hold_ms) return;
      continue;
    }
    bool is_busy = r->busy && now < r->busy_until_ms;
    double next = news->next_ms < until_ms ? news->next_ms : until_ms;
    if (r->gathered_ms + GATHER_MS_MAX < next) next = r->gathered_ms + GATHER_MS_MAX;
    if (is_busy) for (uint32_t i = 0; i < r->sockets; i++) wake(&r->socket[i]);
    if (sleep_until(r, is_busy ? now : next)) return;
  }
}
