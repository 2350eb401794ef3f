// Owns every fixed bound in the system: what may be, at most, and why that much.

/** Sequences that hold a slot at once, unless `--max-sequences` says otherwise. */
export const MAX_SEQUENCES_DEFAULT = 64

/** Sequences that may wait for a slot, unless `--max-queue` says otherwise; beyond it, 429. */
export const MAX_QUEUE_DEFAULT = 512

/** Tokens one engine step may process: prefill chunks plus one for each decoding sequence. */
export const STEP_TOKENS_MAX_DEFAULT = 512

/** On a GPU: as many as its matrix products need to be at their fastest. */
export const STEP_TOKENS_GPU = 2048

/**
 * Mappings that slots may have together, to share pages: half of the 65,530 that the kernel allows
 * a process (vm.max_map_count).
 */
export const KV_MAPPINGS_MAX = 1 << 15

/** Regions of memory, beyond those of slots, that cached prefixes may lie in. */
export const PREFIX_REGIONS = 256

/** Prefixes that are pinned at once; looked through one by one. */
export const MAX_PINNED_PREFIXES = 64

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

/** Bytes of all metadata and tensor infos; Gemma's 262,144 tokens with scores need 8 MiB. */
export const GGUF_MAX_HEADER_BYTES = 256 << 20
/** The format's own bounds: a key's bytes, a tensor name's bytes. */
export const GGUF_MAX_KEY_BYTES = 65535
export const GGUF_MAX_NAME_BYTES = 64
/** One string value; the longest chat templates have 100 KiB. */
export const GGUF_MAX_STRING_BYTES = 16 << 20
/** Elements of one array; the largest vocabularies have 600,000 merges. */
export const GGUF_MAX_ARRAY_LENGTH = 1 << 22
export const GGUF_MAX_ARRAY_DEPTH = 4

/** Layers of a model; the deepest published have 126. Bounds loops before tensors are counted. */
export const MODEL_MAX_LAYERS = 1024

/** JSON header of one safetensors file; 100,000 tensors need 12 MiB. */
export const SAFETENSORS_MAX_HEADER_BYTES = 32 << 20
/** config.json, an index or a tokenizer.json; Gemma's tokenizer.json has 33 MiB. */
export const MODEL_MAX_JSON_BYTES = 128 << 20

/** Connections of one download at once, and the least bytes that are worth one. */
export const DOWNLOAD_CONNECTIONS = 4
export const DOWNLOAD_MIN_SEGMENT_BYTES = 4 << 20
/** Attempts in a row that bring no byte before a download gives up; partial files stay. */
export const DOWNLOAD_ATTEMPTS = 5
/** A connection without a byte for this long counts as dropped. */
export const DOWNLOAD_STALL_MS = 30_000

/**
 * Requests that the datagram path remembers at once, each for 30 s. The most take half a gigabyte
 * of the kernel's memory: 10^5 a second for 40 s.
 */
export const NET_REQUESTS_DEFAULT = 65_536
export const NET_REQUESTS_MAX = 1 << 22
