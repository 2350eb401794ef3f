// Owns SipHash-2-4 (Aumasson and Bernstein, 2012) for what the protocol signs: a keyed hash that is
// secure for short inputs and costs about one nanosecond per input byte without vector registers,
// which BPF has none of. Also for the native ring. Oracle: the paper's test vectors, in the tests of
// the program.
#pragma once

#include <linux/types.h>

struct sip {
  __u64 v0, v1, v2, v3;
};

#ifdef __bpf__

/**
 * In the fewest instructions, which the compiler does not find: a rotation is four, as BPF has
 * none, and where another word is mixed in that goes between its halves, which saves waiting.
 */
static __always_inline void sip_round(struct sip *s) {
  __u64 t;
  asm("%[v0] += %[v1]\n"
      "%[t] = %[v1]\n %[t] >>= 51\n %[v1] <<= 13\n %[t] ^= %[v0]\n %[v1] ^= %[t]\n"
      "%[v2] += %[v3]\n"
      "%[t] = %[v3]\n %[t] >>= 48\n %[v3] <<= 16\n %[t] ^= %[v2]\n %[v3] ^= %[t]\n"
      "%[t] = %[v0]\n %[t] >>= 32\n %[v0] <<= 32\n %[v0] |= %[t]\n"
      "%[v2] += %[v1]\n"
      "%[t] = %[v1]\n %[t] >>= 47\n %[v1] <<= 17\n %[t] ^= %[v2]\n %[v1] ^= %[t]\n"
      "%[v0] += %[v3]\n"
      "%[t] = %[v3]\n %[t] >>= 43\n %[v3] <<= 21\n %[t] ^= %[v0]\n %[v3] ^= %[t]\n"
      "%[t] = %[v2]\n %[t] >>= 32\n %[v2] <<= 32\n %[v2] |= %[t]\n"
      : [v0] "+r"(s->v0), [v1] "+r"(s->v1), [v2] "+r"(s->v2), [v3] "+r"(s->v3), [t] "=&r"(t));
}

#else

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

#endif

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
