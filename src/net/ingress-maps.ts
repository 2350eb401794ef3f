// Owns where things lie in the memory that the ingress program shares with us; the program's side
// is bpf/ingress-maps.h, and a test compares the two by what the program does with them.

/** struct tenant */
export const TENANT = {
  bytes: 128,
  /** Two keys of 16 bytes. */
  keys: 0,
  nsPerToken1024: 32,
  burstNs: 40,
  fullAtNs: 48,
  live: 56,
  liveMax: 60,
  granted: 64,
  rejected: 72,
  chargedTokens: 80,
} as const

/** struct control */
export const CONTROL = {
  cookieKey: 0,
  clockOffsetUs: 16,
  live: 24,
  liveMax: 28,
  replicas: 32,
  addresses: 288,
  address4: 296,
  address6: 360,
  queues: 616,
  bytes: 624,
} as const
export const ADDRESSES_MAX = 16

/** struct replica */
export const REPLICA = { bytes: 16, ready: 0, model: 4, live: 8, other: 12 } as const
export const REPLICAS_MAX = 16
/** Rings of one replica: one for each receive queue of the interface. */
export const QUEUES_MAX = 64

/** struct request_key and struct request; of the latter, what user space reads and writes. */
export const REQUEST_KEY = { bytes: 16, request: 0, tenant: 8 } as const
export const REQUEST = {
  bytes: 56,
  grantedNs: 0,
  expiresNs: 8,
  route: 44,
  chargedTokens: 48,
  ended: 52,
} as const

/** struct event */
export const EVENT = {
  bytes: 40,
  ktimeNs: 0,
  request: 8,
  tenant: 16,
  route: 20,
  promptBytes: 24,
  maxTokens: 28,
  type: 32,
  code: 34,
  retryMs: 36,
} as const

/** `.rodata`: the program's tunables. */
export const TUNABLES = {
  port: 0,
  windowUs: 8,
  credit: 16,
  loadFactor2: 24,
  loadSlack: 28,
  sampleEvery: 32,
  synPort: 36,
  synSourceNs: 40,
  synSourceBurstNs: 48,
  synTotalNs: 56,
  synTotalBurstNs: 64,
} as const

/** enum counter, in order; those of rejections follow from 16 on, by code − 16. */
export const COUNTERS = [
  'passed',
  'hello',
  'granted',
  'repeated',
  'rejected',
  'forwarded',
  'bad_header',
  'bad_mac',
  'bad_cookie',
  'bad_type',
  'no_ring',
  'events_lost',
  'stale',
  'syn',
  'syn_source',
  'syn_total',
] as const
export const COUNTERS_MAX = 32
export const COUNTERS_BY_CODE = 16
