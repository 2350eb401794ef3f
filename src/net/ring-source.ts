// Owns where the ring thread's prompts come from: frames of AF_XDP rings, put together natively or
// in TypeScript.

import type { Bell } from '../ffi/bell.ts'
import { NEWS } from '../ffi/native-ring.ts'
import type { PacketSocket } from '../ffi/packet-socket.ts'
import type { XdpSocket } from '../ffi/xdp-socket.ts'
import { type Intake, type IntakeEvents, TypeScriptIntake } from './intake.ts'
import { NativeIntake } from './native-intake.ts'
import type { NetRing } from './ring-choice.ts'
import { type SipKey, sipKey } from './siphash.ts'

export interface RingSource {
  readonly intake: Intake
  /** The time of this turn, in milliseconds: asking for it costs as much as a short hash. */
  readonly nowMs: number
  /** Sleeps until then at most, unless there is something to take or the bell rings. */
  wait(untilMs: number): void
  /** Passes on what came. */
  take(): void
  /** Frames for which there was no room, and those that could not be sent. */
  readonly lost: { received: number; sent: number }
  close(): void
}

export interface SourceOptions {
  /** By tenant: its two keys. */
  keys: ReadonlyMap<number, readonly [Uint8Array, Uint8Array]>
  /** Requests that may be known at once. */
  flows: number
  /** Packets at a time that are taken from the driver by asking it; 0 sleeps. */
  busyPollBudget: number
  sockets: readonly XdpSocket[]
  out: PacketSocket
  bell: Bell
}

/** With busy-polling: so long after the last frame the driver is asked again and again. */
const BUSY_MS = 2
/** Frames of a queue before what they ask for is sent. */
const BURST = 256

export function openSource(
  kind: NetRing,
  options: SourceOptions,
  events: IntakeEvents,
): RingSource {
  return kind === 'native'
    ? new NativeSource(options, events)
    : new TypeScriptSource(options, events)
}

class NativeSource implements RingSource {
  readonly intake: NativeIntake
  private readonly out: PacketSocket

  constructor(options: SourceOptions, events: IntakeEvents) {
    const { sockets, bell, out, busyPollBudget } = options
    this.intake = new NativeIntake(options, events)
    this.out = out
    const words = sockets.map((socket) => socket.words)
    this.intake.native.connect(words, bell.fd, out.fd, busyPollBudget > 0)
  }

  get nowMs(): number {
    return this.intake.native.news.getFloat64(NEWS.nowMs, true)
  }

  wait(untilMs: number): void {
    this.intake.native.wait(untilMs)
  }

  take(): void {
    this.intake.tell()
  }

  get lost(): { received: number; sent: number } {
    const { news } = this.intake.native
    const count = (at: number) => Number(news.getBigUint64(at, true))
    return { received: count(NEWS.refused), sent: count(NEWS.unsent) + this.out.lost }
  }

  close(): void {
    this.intake.native.close()
  }
}

class TypeScriptSource implements RingSource {
  readonly intake: TypeScriptIntake
  nowMs = performance.now()
  private readonly options: SourceOptions
  private busyUntilMs = 0
  private taken = 0
  private readonly frame = (view: DataView, at: number, bytes: number): void => {
    this.intake.take(view, at, bytes)
  }

  constructor(options: SourceOptions, events: IntakeEvents) {
    this.options = options
    const keys = new Map<number, SipKey>()
    for (const [tenant, pair] of options.keys) {
      pair.forEach((key, index) => keys.set(2 * tenant + index, sipKey(key)))
    }
    const known = (tenant: number, index: number) =>
      index < 2 ? keys.get(2 * tenant + index) : undefined
    const world = {
      now: () => this.nowMs,
      timeUs: () => BigInt(Date.now()) * 1000n,
      send: (write: (frame: Uint8Array) => number) => options.out.send(write),
    }
    this.intake = new TypeScriptIntake(known, world, events)
  }

  wait(untilMs: number): void {
    const { busyPollBudget, sockets, bell } = this.options
    // If something came there may be more already.
    if (this.taken === 0) {
      const waitMs = Math.ceil(untilMs - performance.now())
      if (busyPollBudget > 0 && this.nowMs < this.busyUntilMs) {
        for (const socket of sockets) socket.poll()
      } else if (waitMs > 0) bell.wait(waitMs)
    }
    this.nowMs = performance.now()
  }

  take(): void {
    this.taken = 0
    for (const socket of this.options.sockets) this.taken += socket.receive(this.frame, BURST)
    if (this.taken > 0) this.busyUntilMs = this.nowMs + BUSY_MS
  }

  get lost(): { received: number; sent: number } {
    return { received: 0, sent: this.options.out.lost }
  }

  close(): void {}
}
