// Owns SipHash-2-4 (Aumasson and Bernstein, 2012) for what the protocol signs: a keyed hash that is
// secure for short inputs and costs about one nanosecond per input byte without vector registers,
// which BPF has none of. Oracle: the paper's test vectors, in the tests of the program.
#pragma once

#include <linux/types.h>

struct sip {
  __u64 v0, v1, v2, v3;
};

static __always_inline __u64 sip_rotate(__u64 x, int by) {
  return (x << by) | (x >> (64 - by));
}

static __always_inline void sip_round(struct sip *s) {
  s->v0 += s->v1;
  s->v2 += s->v3;
  s->v1 = sip_rotate(s->v1, 13) ^ s->v0;
  s->v3 = sip_rotate(s->v3, 16) ^ s->v2;
  s->v0 = sip_rotate(s->v0, 32);
  s->v2 += s->v1;
  s->v0 += s->v3;
  s->v1 = sip_rotate(s->v1, 17) ^ s->v2;
  s->v3 = sip_rotate(s->v3, 21) ^ s->v0;
  s->v2 = sip_rotate(s->v2, 32);
}

static __always_inline void sip_begin(struct sip *s, __u64 key0, __u64 key1) {
  s->v0 = key0 ^ 0x736f6d6570736575ull;
  s->v1 = key1 ^ 0x646f72616e646f6dull;
  s->v2 = key0 ^ 0x6c7967656e657261ull;
  s->v3 = key1 ^ 0x7465646279746573ull;
}

/** Takes in eight bytes, read as a little-endian integer. */
static __always_inline void sip_word(struct sip *s, __u64 word) {
  s->v3 ^= word;
  sip_round(s);
  sip_round(s);
  s->v0 ^= word;
}

/** @param tail the input's last bytes that fill no word, the input's length in the highest byte */
static __always_inline __u64 sip_end(struct sip *s, __u64 tail) {
  sip_word(s, tail);
  s->v2 ^= 0xff;
  sip_round(s);
  sip_round(s);
  sip_round(s);
  sip_round(s);
  return s->v0 ^ s->v1 ^ s->v2 ^ s->v3;
}
