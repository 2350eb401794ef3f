// Owns where things lie in the memory that the ingress program shares with us; the program's side
// is bpf/ingress-maps.h, and a test compares the two by what the program does with them.

/** struct tenant */
export const TENANT = {
  bytes: 64,
  /** Two keys of 16 bytes. */
  keys: 0,
  nsPerToken1024: 32,
  burstNs: 40,
  fullAtNs: 48,
  live: 56,
  liveMax: 60,
} as const

/** struct tenant_use, one a CPU */
export const TENANT_USE = { bytes: 24, granted: 0, rejected: 8, chargedTokens: 16 } as const

/** struct control */
export const CONTROL = {
  cookieKey: 0,
  tableKey: 16,
  clockOffsetUs: 32,
  queues: 40,
  live: 48,
  remembered: 52,
  liveMax: 56,
  rememberedMax: 60,
  addresses: 64,
  replicasEnd: 68,
  address4: 72,
  address6: 136,
  replicas: 392,
  bytes: 648,
} as const
export const ADDRESSES_MAX = 16

/** struct replica */
export const REPLICA = { bytes: 16, ready: 0, model: 4, live: 8, other: 12 } as const
export const REPLICAS_MAX = 16
/** Rings of one replica: one for each receive queue of the interface. */
export const QUEUES_MAX = 64

/** struct request, what user space reads and writes of it. */
export const REQUEST = {
  bytes: 96,
  request: 0,
  tenant: 8,
  state: 12,
  grantedNs: 16,
  expiresNs: 24,
  route: 76,
  chargedTokens: 80,
} as const

/** enum request_state */
export const REQUEST_STATES = { entering: 0, runs: 1, ended: 2 } as const

/** struct bucket: tags come first. */
export const BUCKET = { bytes: 1408, slots: 14, probes: 4, overflowed: 56, requests: 64 } as const

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
  isRepeat: 33,
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
  requestBuckets: 72,
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
