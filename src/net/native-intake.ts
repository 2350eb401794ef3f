// Owns what the native intake of prompts tells, as flows and events: it says which and when, in
// memory that is read here.

import {
  EVENT,
  EVENT_KINDS,
  FLOW,
  NativeFlows,
  NEWS,
  NO_SLOT,
  OUT_BYTES,
} from '../ffi/native-ring.ts'
import type { Flow } from './exchange.ts'
import { ReturnPath } from './frame.ts'
import { INTAKE_LIMITS, type Intake, type IntakeEvents, type IntakeWorld } from './intake.ts'
import { MESSAGE_CODES, type MessageCode, type WireSampling } from './protocol.ts'
import { type SipKey, sipKey } from './siphash.ts'

/** Short prompts whose memory is there beforehand: 16 MiB. */
const SLOTS = 1024

export interface NativeIntakeOptions {
  /** There are never more at once. */
  flows: number
  slots?: number
  limits?: typeof INTAKE_LIMITS
  /** By tenant: its two keys. */
  keys: ReadonlyMap<number, readonly [Uint8Array, Uint8Array]>
}

const CODES = new Map<number, MessageCode>(
  Object.entries(MESSAGE_CODES).map(([name, code]) => [code, name as MessageCode]),
)

export class NativeIntake implements Intake {
  readonly native: NativeFlows
  private readonly events: IntakeEvents
  /** By 2 · tenant + which of its two. */
  private readonly keys = new Map<number, SipKey>()
  /** Undefined if frames come from sockets: then the native side knows the time and sends. */
  private readonly byHand: IntakeWorld | undefined

  /** @throws LatticeError `os_call_failed` if there is no memory */
  constructor(options: NativeIntakeOptions, events: IntakeEvents, byHand?: IntakeWorld) {
    const { flows, slots = SLOTS, limits = INTAKE_LIMITS, keys } = options
    this.native = new NativeFlows({ flows, slots, ...limits })
    this.native.news.setFloat64(NEWS.nowMs, byHand?.now() ?? this.native.now(), true)
    this.events = events
    this.byHand = byHand
    for (const [tenant, pair] of keys) {
      pair.forEach((key, which) => {
        this.native.setKey(tenant, which, key)
        this.keys.set(2 * tenant + which, sipKey(key))
      })
    }
  }

  get size(): number {
    return this.native.news.getUint32(NEWS.flows, true)
  }

  get arriving(): number {
    return this.native.news.getUint32(NEWS.arriving, true)
  }

  get arrivingBytes(): number {
    return Number(this.native.news.getBigUint64(NEWS.arrivingBytes, true))
  }

  /** Of what it does itself: who waits for the sockets' frames need not know. */
  get nextMs(): number | undefined {
    const nextMs = this.native.news.getFloat64(NEWS.nextMs, true)
    return this.byHand && nextMs < Infinity ? nextMs : undefined
  }

  take(view: DataView, at: number, bytes: number): void {
    this.step(new Uint8Array(view.buffer, view.byteOffset + at, bytes))
  }

  turn(): void {
    if (this.byHand) this.step(new Uint8Array())
  }

  /** Passes on what was told since the last wait. */
  tell(): void {
    const { news } = this.native
    const count = news.getUint32(NEWS.events, true)
    for (let i = 0; i < count; i++) this.hear(NEWS.event + i * EVENT.bytes)
  }

  keyOf(tenant: number, which: number): SipKey {
    return this.keys.get(2 * tenant + which)!
  }

  private step(frame: Uint8Array): void {
    const { native, byHand } = this
    if (!byHand) return
    native.step(byHand.now(), byHand.timeUs(), frame)
    const out = native.news.getUint32(NEWS.out, true)
    for (let i = 0; i < out; i++) {
      const bytes = native.news.getUint32(NEWS.outBytes + 4 * i, true)
      byHand.send((to) => {
        to.set(new Uint8Array(native.out, i * OUT_BYTES, bytes))
        return bytes
      })
    }
    this.tell()
  }

  private hear(at: number): void {
    const { events } = this
    const { news } = this.native
    const kind = news.getUint32(at + EVENT.kind, true)
    const id = news.getUint32(at + EVENT.flow, true)
    const value = news.getUint32(at + EVENT.value, true)
    if (kind === EVENT_KINDS.acknowledged) {
      const firstMissing = news.getUint32(at + EVENT.firstMissing, true)
      const bitmap = news.getBigUint64(at + EVENT.bitmap, true)
      events.acknowledged(id, firstMissing, bitmap, news.getUint32(at + EVENT.credit, true))
    } else if (kind === EVENT_KINDS.stopped) events.stopped(id, CODES.get(value)!)
    else {
      const flow = new NativeFlow(this, id)
      const isClaim = news.getUint32(at + EVENT.isClaim, true) !== 0
      if (isClaim || kind === EVENT_KINDS.claimed) events.claimed(flow)
      if (kind === EVENT_KINDS.arrived) events.arrived(flow, this.promptOf(flow, value))
      else if (kind === EVENT_KINDS.failed) events.failed(flow, CODES.get(value)!)
    }
  }

  /** Of one in a slot: until more is taken. */
  private promptOf({ id, promptBytes }: NativeFlow, slotAt: number): Uint8Array {
    if (slotAt !== NO_SLOT) return new Uint8Array(this.native.slots, slotAt, promptBytes)
    const prompt = new Uint8Array(promptBytes)
    this.native.read(id, prompt)
    return prompt
  }
}

/** Read where it lies; not any more once it lingers. */
class NativeFlow implements Flow {
  readonly id: number
  private readonly intake: NativeIntake
  private readonly view: DataView
  private readonly at: number

  constructor(intake: NativeIntake, id: number) {
    this.id = id
    this.intake = intake
    this.view = intake.native.flows
    this.at = id * FLOW.bytes
  }

  get tenant(): number {
    return this.view.getUint32(this.at + FLOW.tenant, true)
  }

  get request(): bigint {
    return this.view.getBigUint64(this.at + FLOW.request, true)
  }

  get route(): number {
    return this.view.getUint32(this.at + FLOW.route, true)
  }

  get cookie(): bigint {
    return this.view.getBigUint64(this.at + FLOW.cookie, true)
  }

  get flags(): number {
    return this.view.getUint16(this.at + FLOW.flags, true)
  }

  get maxTokens(): number {
    return this.view.getUint32(this.at + FLOW.maxTokens, true)
  }

  get promptBytes(): number {
    return this.view.getUint32(this.at + FLOW.promptBytes, true)
  }

  get arrivedBytes(): number {
    return this.view.getUint32(this.at + FLOW.arrivedBytes, true)
  }

  get credit(): number {
    return this.view.getUint32(this.at + FLOW.credit, true)
  }

  get keyIndex(): number {
    return this.view.getUint16(this.at + FLOW.key, true)
  }

  get key(): SipKey {
    return this.intake.keyOf(this.tenant, this.keyIndex)
  }

  get sampling(): WireSampling {
    const topP = this.view.getFloat32(this.at + FLOW.sampling, true)
    const temperature = this.view.getFloat32(this.at + FLOW.sampling + 4, true)
    const seed = this.view.getBigUint64(this.at + FLOW.seed, true)
    return { temperature, topP: topP === 0 ? 1 : topP, seed }
  }

  path(): ReturnPath {
    const { view, at } = this
    const headBytes = view.getUint8(at + FLOW.headBytes)
    const head = new Uint8Array(view.buffer, view.byteOffset + at + FLOW.head, headBytes)
    const version = view.getUint8(at + FLOW.version) === 4 ? 4 : 6
    return new ReturnPath(head.slice(), view.getUint8(at + FLOW.ip), version)
  }

  linger(untilMs: number): void {
    this.intake.native.linger(this.id, untilMs)
  }
}
