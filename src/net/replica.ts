// Owns the engine's end of the datagram protocol: prompts that an intake has put together are
// started, and each is answered. No I/O, no clock of its own.

import { Exchange, type ExchangeWorld, type Flow } from './exchange.ts'
import type { WireAnswer, WireRequest } from './exchange.ts'
import type { Intake, IntakeEvents } from './intake.ts'
import { MESSAGE_FLAGS, type MessageCode } from './protocol.ts'
import { Turns } from './turns.ts'

export interface ReplicaWorld extends Omit<ExchangeWorld, 'touch'> {
  /** The first DATA of a granted request is here: from now on it will be `finished`. */
  claimed(tenant: number, request: bigint): void
  /** Starts a request; returns what aborts it. */
  start(request: WireRequest, answer: WireAnswer): () => void
}

export class Replica implements IntakeEvents {
  private readonly exchanges = new Map<number, Exchange>()
  private readonly turns = new Turns<Exchange>()
  private readonly world: ReplicaWorld & ExchangeWorld
  private readonly intake: Intake

  /** @param open makes the intake, which tells the replica of what comes */
  constructor(open: (events: IntakeEvents) => Intake, world: ReplicaWorld) {
    this.world = { ...world, touch: (exchange) => this.turns.touch(exchange) }
    this.intake = open(this)
  }

  /** Requests that are remembered, whether they run or only linger. */
  get size(): number {
    return this.intake.size
  }

  /** Bytes that unfinished prompts have. */
  get arrivingBytes(): number {
    return this.intake.arrivingBytes
  }

  /** Nothing is left to say or to hear. */
  get settled(): boolean {
    return this.exchanges.size === 0 && this.intake.arriving === 0
  }

  take(view: DataView, at: number, bytes: number): void {
    this.intake.take(view, at, bytes)
  }

  /** Sends what is due. Returns when there is more to do if nothing arrives; undefined if never. */
  turn(): number | undefined {
    this.intake.turn()
    const next = this.turns.run(this.world.now(), (exchange) => {
      const nextMs = exchange.turn()
      if (nextMs === undefined) this.exchanges.delete(exchange.flow.id)
      return nextMs
    })
    const { nextMs } = this.intake
    return next === undefined || nextMs === undefined ? (next ?? nextMs) : Math.min(next, nextMs)
  }

  claimed({ tenant, request }: Flow): void {
    this.world.claimed(tenant, request)
  }

  arrived(flow: Flow, prompt: Uint8Array): void {
    const exchange = this.open(flow)
    const { tenant, request, route, flags, maxTokens, sampling } = flow
    const chat = (flags & MESSAGE_FLAGS.chat) !== 0
    const raw = (flags & MESSAGE_FLAGS.raw) !== 0
    const wire = { tenant, request, route, prompt, chat, raw, maxTokens, sampling }
    exchange.started(this.world.start(wire, exchange))
  }

  failed(flow: Flow, code: MessageCode): void {
    this.open(flow).cancel(code)
  }

  acknowledged(id: number, firstMissing: number, bitmap: bigint, credit: number): void {
    this.exchanges.get(id)?.acknowledge(firstMissing, bitmap, credit)
  }

  stopped(id: number, code: MessageCode): void {
    this.exchanges.get(id)?.cancel(code)
  }

  private open(flow: Flow): Exchange {
    const exchange = new Exchange(flow, this.world)
    this.exchanges.set(flow.id, exchange)
    return exchange
  }
}
