// Owns the datagram protocol as the kernel reads it; docs/protocol.md specifies it.
#pragma once

#include <linux/types.h>

#define LT_MAGIC 0x4c54
#define LT_VERSION 1
#define LT_PORT 7411

#define LT_TENANTS 1024
#define LT_FRAGMENT_BYTES 1200
/** 2^26: with the largest max_tokens, a cost in tokens times a price in ns / 1024 fits 64 bits. */
#define LT_PROMPT_BYTES_MAX (1u << 26)
#define LT_MAX_TOKENS_MAX (1u << 20)

/** CHAT, RAW and RETRY. */
#define LT_FLAGS 7

enum lt_type {
  LT_HELLO = 1,
  LT_GRANT = 2,
  LT_REJECT = 3,
  LT_DATA = 4,
  LT_ACK = 5,
  LT_TOKENS = 6,
  LT_END = 7,
  LT_CANCEL = 8,
};

enum lt_code {
  LT_OK = 0,
  LT_CODE_VERSION = 16,
  LT_CODE_CLOCK = 17,
  LT_CODE_MALFORMED = 18,
  LT_CODE_MODEL = 19,
  LT_CODE_REUSED = 20,
  LT_CODE_BUSY = 21,
  LT_CODE_TENANT_BUSY = 22,
  LT_CODE_RATE = 23,
  LT_CODE_NO_REPLICA = 24,
  /** 25 and 26 are said by the engine. */
  LT_CODE_TOO_LARGE = 27,
};

/** 96 bytes, big-endian, each field on its own alignment; the last 8 are the MAC of those before. */
struct lt_header {
  __be16 magic;
  __u8 version;
  __u8 type;
  __be16 payload_bytes;
  __be16 flags;
  __be32 tenant;
  __be16 key;
  __be16 code;
  __be64 request;
  __be64 time_us;
  __be32 route;
  __be32 model;
  __be32 prompt_bytes;
  __be32 max_tokens;
  __be32 deadline_ms;
  __be16 fragment;
  __be16 fragments;
  __be64 word[4];
  __be64 mac;
};

_Static_assert(sizeof(struct lt_header) == 96, "docs/protocol.md says so");
