// Owns prompts on their way in: which request a frame belongs to, what of its prompt is there, what
// is acknowledged, and how much memory unfinished prompts may take. The ingress program has let
// every datagram in by its MAC and cookie; what is in it is checked here. native/intake.c does the
// same. No I/O, no clock of its own.

import { type Flow, writeFrame } from './exchange.ts'
import { type FrameLayout, layoutOf, ReturnPath } from './frame.ts'
import { NumberedReceiver } from './numbered.ts'
import {
  FIELDS,
  FRAGMENT_BYTES,
  fragmentsOf,
  type Header,
  HEADER_BYTES,
  headerAt,
  isDatagram,
  isHash,
  MESSAGE_FLAGS,
  MESSAGE_TYPES,
  type MessageCode,
  readSampling,
  type WireSampling,
} from './protocol.ts'
import type { SipKey } from './siphash.ts'
import { type Turned, Turns } from './turns.ts'

/** What is heard of flows. */
export interface IntakeEvents {
  /** From now on it will be finished. What arrives or fails is claimed before. */
  claimed(flow: Flow): void
  /** All of the prompt is here; from now on it is whose who hears of it, until it lingers. */
  arrived(flow: Flow, prompt: Uint8Array): void
  /** The prompt is not wanted any more; otherwise as if it had arrived. */
  failed(flow: Flow, code: MessageCode): void
  acknowledged(id: number, firstMissing: number, bitmap: bigint, credit: number): void
  /** Its answer is not wanted any more. */
  stopped(id: number, code: MessageCode): void
}

/** Where prompts come from. */
export interface Intake {
  /** Flows there are, whether they run or only linger, and those that have not arrived. */
  readonly size: number
  readonly arriving: number
  readonly arrivingBytes: number
  /** A frame that the ingress program redirected here: it has checked the header and its MAC. */
  take(view: DataView, at: number, bytes: number): void
  /** Does what is due. */
  turn(): void
  /** When more will be due if nothing arrives; undefined if never. */
  readonly nextMs: number | undefined
}

export interface IntakeLimits {
  /** Bytes of prompts that are not complete: of all tenants, and of one. */
  arrivingBytes: number
  arrivingBytesOfTenant: number
}

/** One prompt of the largest size a tenant, and four tenants that send such. */
export const INTAKE_LIMITS: IntakeLimits = {
  arrivingBytes: 256 << 20,
  arrivingBytesOfTenant: 64 << 20,
}

export interface IntakeWorld {
  /** Milliseconds that never go back. */
  now(): number
  /** µs since 1970. */
  timeUs(): bigint
  /** Sends a frame that `write` fills and measures. */
  send(write: (frame: Uint8Array) => number): void
}

/** A prompt that takes longer between two fragments has lost its sender. */
const ARRIVAL_MS = 10_000
/** A client says something every 2 s; one that is silent for so long is gone. */
const SILENCE_MS = 15_000
/** An ended request still answers late repeats for so long. */
const LINGER_MS = 4_000
/** Memory for so many fragments is taken at a time, then twice as much. */
const FIRST_FRAGMENTS = 64
const EMPTY = new Uint8Array()

export class TypeScriptIntake implements Intake {
  nextMs: number | undefined
  size = 0
  arriving = 0
  arrivingBytes = 0
  /** By a mixture of their numbers; those with the same one follow each other. */
  private readonly flows = new Map<number, Arrival>()
  private readonly turns = new Turns<Arrival>()
  private readonly keys: (tenant: number, index: number) => SipKey | undefined
  private readonly world: IntakeWorld
  private readonly events: IntakeEvents
  private readonly limits: IntakeLimits
  private readonly bytesOf = new Map<number, number>()
  private nextId = 1

  /** @param keys by tenant, and which of its two */
  constructor(
    keys: (tenant: number, index: number) => SipKey | undefined,
    world: IntakeWorld,
    events: IntakeEvents,
    limits: IntakeLimits = INTAKE_LIMITS,
  ) {
    this.keys = keys
    this.world = world
    this.events = events
    this.limits = limits
  }

  take(view: DataView, at: number, bytes: number): void {
    const layout = layoutOf(view, at, bytes)
    if (!layout || !isDatagram(view, layout.data, layout.dataBytes)) return
    const { data, dataBytes } = layout
    const flow = this.find(view, data) ?? this.open(view, at, layout)
    if (!flow) return
    flow.heardMs = this.world.now()
    this.touch(flow)
    const type = view.getUint8(data + FIELDS.type)
    if (type === MESSAGE_TYPES.data) this.takeData(flow, view, data, dataBytes)
    else if (type === MESSAGE_TYPES.ack) this.takeAck(flow, view, data)
    else if (type !== MESSAGE_TYPES.cancel) return
    else if (flow.state === 'arriving') this.fail(flow, 'cancelled')
    else if (flow.state === 'handed') this.stop(flow, 'cancelled')
  }

  turn(): void {
    this.nextMs = this.turns.run(this.world.now(), (flow) => this.turnOf(flow))
  }

  /** A flow needs a turn. */
  touch(flow: Arrival): void {
    this.turns.touch(flow)
    this.nextMs = this.world.now()
  }

  /** Returns when it wants its next turn; undefined if never. */
  private turnOf(flow: Arrival): number | undefined {
    const now = this.world.now()
    const { receiver } = flow
    const silentMs = now - flow.heardMs
    if (flow.state === 'lingering' && (silentMs > LINGER_MS || now > flow.untilMs)) {
      this.forget(flow)
      return undefined
    }
    if (receiver.ackMs !== undefined && receiver.ackMs <= now) this.acknowledge(flow)
    const isLate = now >= flow.dueMs
    if (flow.state === 'arriving') {
      if (isLate || silentMs > ARRIVAL_MS) this.fail(flow, 'timed_out')
    } else if (flow.state === 'handed') {
      if (isLate) this.stop(flow, 'timed_out')
      else if (silentMs > SILENCE_MS) this.stop(flow, 'cancelled')
    }
    const next = Math.min(receiver.ackMs ?? Infinity, patienceOf(flow))
    return next === Infinity ? undefined : Math.max(now, next)
  }

  private find(view: DataView, at: number): Arrival | undefined {
    const tenant = view.getUint32(at + FIELDS.tenant)
    const high = view.getUint32(at + FIELDS.request)
    const low = view.getUint32(at + FIELDS.request + 4)
    let flow = this.flows.get(placeOf(tenant, high, low))
    while (flow && !isOf(flow, tenant, high, low)) flow = flow.next
    return flow
  }

  /** Undefined for what comes late after the end, or answers nothing. */
  private open(view: DataView, at: number, layout: FrameLayout): Arrival | undefined {
    const { data } = layout
    const type = view.getUint8(data + FIELDS.type)
    // CANCEL may come before any DATA.
    if (type !== MESSAGE_TYPES.data && type !== MESSAGE_TYPES.cancel) return undefined
    if (view.getUint32(data + FIELDS.promptBytes) === 0) return undefined
    const key = this.keys(view.getUint32(data + FIELDS.tenant), view.getUint16(data + FIELDS.key))
    if (!key) return undefined
    const asked = headerAt(view, data)
    const back = ReturnPath.of(view, at, layout)
    const flow = new Arrival(this.nextId++, asked, key, back, this, this.world.now())
    const place = placeOf(flow.tenant, flow.high, flow.low)
    flow.next = this.flows.get(place)
    this.flows.set(place, flow)
    this.size++
    this.arriving++
    this.events.claimed(flow)
    return flow
  }

  /** Once: it may be in the queue of turns twice. */
  private forget(flow: Arrival): void {
    const place = placeOf(flow.tenant, flow.high, flow.low)
    const first = this.flows.get(place)
    if (first === flow) {
      this.size--
      if (flow.next) this.flows.set(place, flow.next)
      else this.flows.delete(place)
      return
    }
    let before = first
    while (before && before.next !== flow) before = before.next
    if (!before) return
    this.size--
    before.next = flow.next
  }

  private takeData(flow: Arrival, view: DataView, at: number, bytes: number): void {
    const fragment = view.getUint16(at + FIELDS.fragment)
    if (fragment >= flow.fragments) return
    const from = fragment * FRAGMENT_BYTES
    const payloadAt = at + HEADER_BYTES
    const payloadBytes = bytes - HEADER_BYTES
    if (payloadBytes !== Math.min(FRAGMENT_BYTES, flow.promptBytes - from)) return
    if (!isHash(flow.key, view, payloadAt, at + bytes, at + FIELDS.words + 8)) return
    const isNew = flow.receiver.take(fragment, flow.heardMs)
    if (!isNew || flow.state !== 'arriving' || !this.makeRoom(flow, from + payloadBytes)) return
    const payload = new Uint8Array(view.buffer, view.byteOffset + payloadAt, payloadBytes)
    flow.prompt.set(payload, from)
    flow.arrivedBytes += payloadBytes
    if (flow.receiver.firstMissing < flow.fragments) return
    this.acknowledge(flow)
    this.events.arrived(flow, this.handOver(flow))
  }

  private takeAck(flow: Arrival, view: DataView, at: number): void {
    const word = (index: number) => view.getBigUint64(at + FIELDS.words + 8 * index)
    flow.credit = Number(word(3))
    const isAsked = (view.getUint16(at + FIELDS.flags) & MESSAGE_FLAGS.retry) !== 0
    if (isAsked) flow.receiver.asked(flow.heardMs)
    if (flow.state !== 'handed') return
    this.events.acknowledged(flow.id, Number(word(1)), word(2), flow.credit)
  }

  /** What has not arrived takes no memory: else a few datagrams could take it all. */
  private makeRoom(flow: Arrival, bytes: number): boolean {
    const { prompt, promptBytes, tenant } = flow
    if (bytes <= prompt.length) return true
    const least = Math.max(bytes, 2 * prompt.length, FIRST_FRAGMENTS * FRAGMENT_BYTES)
    const wanted = Math.min(promptBytes, least)
    const more = wanted - prompt.length
    const ofTenant = (this.bytesOf.get(tenant) ?? 0) + more
    const { arrivingBytes, arrivingBytesOfTenant } = this.limits
    if (ofTenant > arrivingBytesOfTenant) this.fail(flow, 'tenant_busy')
    else if (this.arrivingBytes + more > arrivingBytes) this.fail(flow, 'busy')
    else {
      this.reserve(tenant, more)
      flow.prompt = new Uint8Array(wanted)
      flow.prompt.set(prompt)
      return true
    }
    return false
  }

  private reserve(tenant: number, bytes: number): void {
    const ofTenant = (this.bytesOf.get(tenant) ?? 0) + bytes
    this.arrivingBytes += bytes
    if (ofTenant > 0) this.bytesOf.set(tenant, ofTenant)
    else this.bytesOf.delete(tenant)
  }

  /** From now on whoever hears of it says how it goes on. Returns its prompt. */
  private handOver(flow: Arrival): Uint8Array {
    const { prompt } = flow
    this.reserve(flow.tenant, -prompt.length)
    this.arriving--
    flow.prompt = EMPTY
    flow.state = 'handed'
    return prompt
  }

  private fail(flow: Arrival, code: MessageCode): void {
    this.handOver(flow)
    this.events.failed(flow, code)
  }

  /** Said once. */
  private stop(flow: Arrival, code: MessageCode): void {
    if (flow.isStopped) return
    flow.isStopped = true
    this.events.stopped(flow.id, code)
  }

  private acknowledge(flow: Arrival): void {
    const { tenant, keyIndex, request, route, cookie, receiver, key } = flow
    const { firstMissing, bitmap, ahead } = receiver
    const words: Header['words'] = [cookie, BigInt(firstMissing), bitmap, BigInt(ahead)]
    const type = MESSAGE_TYPES.ack
    const timeUs = this.world.timeUs()
    const header = { type, tenant, key: keyIndex, request, route, timeUs, words }
    this.world.send((frame) => writeFrame(frame, flow.path(), header, EMPTY, key))
    receiver.said()
  }
}

class Arrival implements Flow, Turned {
  queuedMs = Infinity
  isTouched = false
  /** Another one that is found at the same place. */
  next: Arrival | undefined
  state: 'arriving' | 'handed' | 'lingering' = 'arriving'
  prompt: Uint8Array = EMPTY
  arrivedBytes = 0
  credit = 64
  untilMs = Infinity
  isStopped = false
  heardMs: number
  readonly id: number
  readonly dueMs: number
  readonly fragments: number
  readonly key: SipKey
  readonly receiver = new NumberedReceiver()
  /** Of its number, the upper and the lower half. */
  readonly high: number
  readonly low: number
  /** As its first datagram had them; the program compared them with what was charged. */
  private readonly asked: Header
  private readonly back: ReturnPath
  private readonly intake: TypeScriptIntake

  constructor(
    id: number,
    asked: Header,
    key: SipKey,
    back: ReturnPath,
    intake: TypeScriptIntake,
    nowMs: number,
  ) {
    this.id = id
    this.asked = asked
    this.key = key
    this.back = back
    this.intake = intake
    this.heardMs = nowMs
    this.dueMs = asked.deadlineMs === 0 ? Infinity : nowMs + asked.deadlineMs
    this.fragments = fragmentsOf(asked.promptBytes)
    this.high = Number(asked.request >> 32n)
    this.low = Number(asked.request & 0xffffffffn)
  }

  get tenant(): number {
    return this.asked.tenant
  }

  get request(): bigint {
    return this.asked.request
  }

  get route(): number {
    return this.asked.route
  }

  get cookie(): bigint {
    return this.asked.words[0]
  }

  get flags(): number {
    return this.asked.flags
  }

  get maxTokens(): number {
    return this.asked.maxTokens
  }

  get promptBytes(): number {
    return this.asked.promptBytes
  }

  get sampling(): WireSampling {
    return readSampling(this.asked.words)
  }

  get keyIndex(): number {
    return this.asked.key
  }

  path(): ReturnPath {
    return this.back
  }

  linger(untilMs: number): void {
    this.state = 'lingering'
    this.untilMs = untilMs
    this.intake.touch(this)
  }
}

/** When a flow is waited for no longer. */
function patienceOf(flow: Arrival): number {
  const { state, heardMs, dueMs, untilMs, isStopped } = flow
  if (state === 'arriving') return Math.min(dueMs, heardMs + ARRIVAL_MS + 1)
  if (state === 'lingering') return Math.min(untilMs + 1, heardMs + LINGER_MS + 1)
  return isStopped ? Infinity : Math.min(dueMs, heardMs + SILENCE_MS + 1)
}

/** Numbers are the client's to choose: whoever chooses many for one place slows himself down. */
function placeOf(tenant: number, high: number, low: number): number {
  const mixed =
    Math.imul(low ^ Math.imul(high, 0x85ebca6b), 0x9e3779b1) ^ Math.imul(tenant, 0xc2b2ae35)
  return mixed ^ (mixed >>> 15)
}

function isOf(flow: Arrival, tenant: number, high: number, low: number): boolean {
  return flow.low === low && flow.high === high && flow.tenant === tenant
}
