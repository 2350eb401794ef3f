// Owns calls into native/ring.so: frames from AF_XDP rings become prompts there, without the
// runtime. native/flows.h has the same offsets.

import { fileURLToPath } from 'node:url'
import koffi from 'koffi'
import { assert } from '../assert.ts'
import { LatticeError, toLatticeError } from '../errors.ts'
import { viewMemory } from './libc.ts'

const OBJECT = fileURLToPath(new URL('../../native/ring.so', import.meta.url))

/** Bytes of a flow, and where its fields lie; `head` is what precedes a datagram to its client. */
export const FLOW = {
  bytes: 256,
  request: 0,
  cookie: 8,
  /** Two floats: top_p, temperature. */
  sampling: 16,
  seed: 24,
  heardMs: 32,
  dueMs: 40,
  tenant: 48,
  route: 52,
  maxTokens: 56,
  promptBytes: 60,
  arrivedBytes: 64,
  credit: 68,
  key: 72,
  flags: 74,
  headBytes: 76,
  ip: 77,
  version: 78,
  head: 80,
} as const

/** What is told after each call. */
export const NEWS = {
  nowMs: 0,
  nextMs: 8,
  events: 16,
  out: 20,
  flows: 24,
  arriving: 28,
  arrivingBytes: 32,
  refused: 40,
  unsent: 48,
  outBytes: 56,
  event: 312,
  bytes: 312 + 1024 * 32,
} as const

export const EVENT = {
  bytes: 32,
  kind: 0,
  flow: 4,
  value: 8,
  firstMissing: 12,
  credit: 16,
  isClaim: 20,
  bitmap: 24,
} as const

export const EVENT_KINDS = {
  claimed: 1,
  arrived: 2,
  failed: 3,
  acknowledged: 4,
  stopped: 5,
} as const

/** Of an event's `value`: the prompt lies in no slot. */
export const NO_SLOT = 0xffffffff
const SLOT_BYTES = 16_384
const OUT_FRAMES = 64
export const OUT_BYTES = 256

/** Where a socket's rings lie: `struct lt_socket`. */
export type SocketWords = BigUint64Array

interface Library {
  open(flows: number, slots: number, bytesMax: number, bytesMaxOfTenant: number): number
  close(intake: number): void
  key(intake: number, tenant: number, which: number, bytes: Uint8Array): void
  places(intake: number, places: BigUint64Array): void
  read(intake: number, flow: number, to: Uint8Array): void
  linger(intake: number, flow: number, untilMs: number): void
  step(intake: number, nowMs: number, timeUs: number, frame: Uint8Array, bytes: number): void
  openRing(intake: number, bell: number, out: number, isBusy: number): number
  closeRing(ring: number): void
  add(ring: number, socket: SocketWords): boolean
  now(): number
  wait(ring: number, untilMs: number): void
}

let library: Library | undefined

/** Why the object cannot be used here; undefined if it can. */
export function whyNotNative(): string | undefined {
  try {
    load()
    return undefined
  } catch (thrown) {
    return toLatticeError(thrown).message
  }
}

function load(): Library {
  return (library ??= declare())
}

/** Its layout is that of 64-bit little-endian machines; the object itself is x86-64's. */
function declare(): Library {
  const object = koffi.load(OBJECT)
  const func = (name: string, result: string, parameters: string[]) =>
    object.func(`lattice_${name}`, result, parameters)
  const [flow, intake, ring] = ['uint32_t', 'uintptr_t', 'uintptr_t'] as const
  const counts = ['uint32_t', 'uint32_t', 'double', 'double']
  return {
    open: func('intake_open', intake, counts),
    close: func('intake_close', 'void', [intake]),
    key: func('intake_key', 'void', [intake, 'uint32_t', 'uint32_t', 'const void *']),
    places: func('intake_places', 'void', [intake, 'void *']),
    read: func('intake_read', 'void', [intake, flow, 'void *']),
    linger: func('intake_linger', 'void', [intake, flow, 'double']),
    step: func('intake_step', 'void', [intake, 'double', 'double', 'const void *', 'uint32_t']),
    openRing: func('ring_open', ring, [intake, 'int', 'int', 'int']),
    closeRing: func('ring_close', 'void', [ring]),
    add: func('ring_add', 'bool', [ring, 'const void *']),
    now: func('ring_now', 'double', []),
    wait: func('ring_wait', 'void', [ring, 'double']),
  }
}

export interface FlowsOptions {
  /** There are never more at once. */
  flows: number
  /** Short prompts whose memory is taken beforehand. */
  slots: number
  /** Of prompts that are not complete: of all tenants, and of one. */
  arrivingBytes: number
  arrivingBytesOfTenant: number
}

/** Tables of prompts on their way in, and memory that both sides see. */
export class NativeFlows {
  readonly news: DataView
  readonly flows: DataView
  readonly slots: ArrayBuffer
  readonly out: ArrayBuffer
  private readonly native: Library
  private readonly address: number
  private ring = 0

  /** @throws LatticeError `os_call_failed` if there is no memory */
  constructor({ flows, slots, arrivingBytes, arrivingBytesOfTenant }: FlowsOptions) {
    this.native = load()
    this.address = this.native.open(flows, slots, arrivingBytes, arrivingBytesOfTenant)
    if (this.address === 0) throw new LatticeError('os_call_failed', 'No memory for a ring.')
    const places = new BigUint64Array(4)
    this.native.places(this.address, places)
    const [news, flow, slot, out] = [...places].map(Number) as [number, number, number, number]
    this.news = new DataView(viewMemory(news, NEWS.bytes))
    this.flows = new DataView(viewMemory(flow, (flows + 1) * FLOW.bytes))
    this.slots = viewMemory(slot, slots * SLOT_BYTES)
    this.out = viewMemory(out, OUT_FRAMES * OUT_BYTES)
  }

  setKey(tenant: number, which: number, key: Uint8Array): void {
    this.native.key(this.address, tenant, which, key)
  }

  /** Fills in a prompt that lies in no slot. */
  read(flow: number, to: Uint8Array): void {
    this.native.read(this.address, flow, to)
  }

  /** What repeats of a flow are answered with is all that is left of it, until then. */
  linger(flow: number, untilMs: number): void {
    this.native.linger(this.address, flow, untilMs)
  }

  /** Takes in a frame; with none, time passes. What is to be sent lies in `out`. */
  step(nowMs: number, timeUs: bigint, frame: Uint8Array): void {
    this.native.step(this.address, nowMs, Number(timeUs), frame, frame.length)
  }

  /**
   * From now on frames come from sockets; `wait` takes them.
   * @throws LatticeError `os_call_failed` if there is no memory
   * @param out descriptor of a packet socket
   */
  connect(sockets: readonly SocketWords[], bell: number, out: number, isBusy: boolean): void {
    this.ring = this.native.openRing(this.address, bell, out, isBusy ? 1 : 0)
    if (this.ring === 0) throw new LatticeError('os_call_failed', 'No memory for a ring.')
    for (const socket of sockets) {
      assert(this.native.add(this.ring, socket), 'a socket for each queue has room')
    }
  }

  /** The clock that `wait` has; milliseconds. */
  now(): number {
    return this.native.now()
  }

  /** Sleeps until there is news, the bell rings or it is time. */
  wait(untilMs: number): void {
    this.native.wait(this.ring, untilMs)
  }

  /** What was seen of its memory is gone. */
  close(): void {
    if (this.ring !== 0) this.native.closeRing(this.ring)
    this.native.close(this.address)
  }
}
