// Owns every fixed bound in the system: what may be, at most, and why that much.

/** Sequences that hold a slot at once, unless `--max-sequences` says otherwise. */
export const MAX_SEQUENCES_DEFAULT = 64

/** Sequences that may wait for a slot, unless `--max-queue` says otherwise; beyond it, 429. */
export const MAX_QUEUE_DEFAULT = 512

/** Tokens one engine step may process: prefill chunks plus one for each decoding sequence. */
export const STEP_TOKENS_MAX_DEFAULT = 512

/** Parallel samples of one request (`n`), as OpenAI's API bounds it. */
export const MAX_CHOICES = 128

/** Alternatives reported for each token; OpenAI's API allows 20. */
export const MAX_TOP_LOGPROBS = 20

/** Stop strings of one request and the bytes of each: a match is held back this long at most. */
export const MAX_STOP_STRINGS = 16
export const MAX_STOP_BYTES = 1024

/** A request body; a prompt of a million tokens fits. */
export const MAX_BODY_BYTES = 16 << 20

/** Nesting of a request's JSON; deeper could exhaust the stack of whoever walks it. */
export const MAX_JSON_DEPTH = 64

/** Bytes of a stream that its client has not taken; beyond it the client counts as gone. */
export const MAX_STREAM_BUFFER_BYTES = 1 << 20

/** GGUF: bounds that no real file comes near, so that a hostile count cannot reserve memory. */
export const GGUF_MAX_TENSORS = 1 << 20
export const GGUF_MAX_METADATA = 1 << 16
export const GGUF_MAX_DIMENSIONS = 4
