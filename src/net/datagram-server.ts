// Owns serving over datagrams: requests that the ring hands over become generations of the engine,
// what those say goes back, and the ingress program learns who is there, what is free and which
// prefixes are in memory.

import { LatticeError, toLatticeError } from '../errors.ts'
import type { Engine } from '../engine/api.ts'
import { GREEDY } from '../engine/api.ts'
import { generate } from '../engine/generation.ts'
import type { ChatTemplate } from '../text/chat-template.ts'
import type { Tokenizer } from '../text/tokenizer.ts'
import { interfaceIndex } from '../ffi/xdp-socket.ts'
import { Egress, type EgressPolicy } from './egress.ts'
import { Ingress, type TenantLimits } from './ingress.ts'
import type { MessageCode } from './protocol.ts'
import { Ring, type RingAnswer, type RingPrompt } from './ring.ts'
import type { RingThreadOptions } from './ring-messages.ts'

export interface DatagramTenant extends TenantLimits {
  /** Of the protocol's 1,024. */
  index: number
  /** As the engine knows it: its prefixes are its own. */
  name: string
  /** How its answers are marked and paced; not at all unless given. */
  egress?: EgressPolicy
}

export interface DatagramServerOptions {
  engine: Engine
  tokenizer: Tokenizer
  template: ChatTemplate | undefined
  interfaceName: string
  queue: number
  mode: RingThreadOptions['mode']
  busyPollBudget: number
  tenants: readonly DatagramTenant[]
  maxRunning: number
  port: number
  /** The ring thread is gone. */
  onFailure: (error: LatticeError) => void
}

const CLOCK_MS = 5_000
const REPLICA = 0
/** Rings of one replica, in bpf/ingress-maps.h. */
const QUEUES = 64

export class DatagramServer {
  readonly ingress: Ingress
  readonly egress: Egress
  private readonly options: DatagramServerOptions
  private readonly ring: Ring
  private readonly detach: readonly (() => void)[]
  private readonly timer: NodeJS.Timeout
  private readonly names: ReadonlyMap<number, string>
  private nextId = 1

  private constructor(
    options: DatagramServerOptions,
    { ingress, egress }: { ingress: Ingress; egress: Egress },
    ring: Ring,
    index: number,
  ) {
    this.options = options
    this.ingress = ingress
    this.egress = egress
    this.ring = ring
    this.names = new Map(options.tenants.map(({ index: tenant, name }) => [tenant, name]))
    ingress.setRing(REPLICA * QUEUES + options.queue, ring.fd)
    ingress.setReplica(REPLICA, options.engine.model.id)
    const detachEgress = egress.attach(options.interfaceName)
    this.detach = [ingress.program.attachXdp(index), detachEgress]
    this.timer = setInterval(() => {
      ingress.syncClock()
      ingress.expire()
    }, CLOCK_MS)
    this.timer.unref()
  }

  /**
   * Opens the ring and attaches the program.
   * @throws LatticeError `invalid_request` if there is no such interface, and as `Ingress`, `Ring`
   *   and attaching do; then nothing is attached
   */
  static async start(options: DatagramServerOptions): Promise<DatagramServer> {
    const index = interfaceIndex(options.interfaceName)
    if (index === 0) {
      throw new LatticeError('invalid_request', `No interface '${options.interfaceName}'.`, {
        todo: '`ip link` lists those of this network namespace.',
      })
    }
    const ingress = Ingress.load({ port: options.port })
    ingress.setMaxRunning(options.maxRunning)
    const egress = Egress.load(options.port)
    for (const tenant of options.tenants) {
      ingress.setTenant(tenant.index, tenant)
      if (tenant.egress) egress.setTenant(tenant.index, tenant.egress)
    }
    const { queue, mode, busyPollBudget } = options
    const keys = new Map(options.tenants.map(({ index: tenant, keys: pair }) => [tenant, pair]))
    let server: DatagramServer | undefined
    try {
      const ring = await Ring.open(
        { ifindex: index, queue, mode, busyPollBudget, keys },
        {
          start: (prompt, answer) => server?.run(prompt, answer) ?? (() => {}),
          finished: (tenant, request, used) => void ingress.finish(tenant, request, used),
          lost: () => {},
          failed: options.onFailure,
        },
      )
      server = new DatagramServer(options, { ingress, egress }, ring, index)
      return server
    } catch (thrown) {
      ingress.close()
      egress.close()
      throw thrown
    }
  }

  async close(): Promise<void> {
    clearInterval(this.timer)
    for (const detach of this.detach) detach()
    await this.ring.close()
    this.ingress.close()
    this.egress.close()
  }

  /** Starts a generation; returns what aborts it. */
  private run(request: RingPrompt, answer: RingAnswer): () => void {
    const { engine, tokenizer } = this.options
    try {
      const prompt = this.encode(request)
      const { temperature, topP, seed } = request.sampling
      const room = engine.model.contextLength - prompt.length
      if (room < request.maxTokens) {
        answer.end('context', 0, 0)
        return () => {}
      }
      let cachedTokens = 0
      const generation = generate(engine, tokenizer, {
        requestId: `dgram-${this.nextId++}`,
        tenant: this.names.get(request.tenant) ?? 'default',
        prompt,
        choices: 1,
        sampling: { ...GREEDY, temperature, topP, seed: Number(BigInt.asUintN(47, seed)) },
        maxTokens: request.maxTokens,
        stop: [],
        ignoreEos: false,
        topLogprobs: undefined,
        onStart: (cached) => (cachedTokens = cached),
      })
      void this.answer(generation.events, answer, () => cachedTokens)
      return () => generation.abort()
    } catch (thrown) {
      const { code } = toLatticeError(thrown)
      answer.end(code === 'context_length_exceeded' ? 'context' : 'failed', 0, 0)
      return () => {}
    }
  }

  private async answer(
    events: ReturnType<typeof generate>['events'],
    answer: RingAnswer,
    cachedTokens: () => number,
  ): Promise<void> {
    for await (const event of events) {
      if (event.kind === 'delta') {
        answer.tokens(
          event.tokens.map(({ token }) => token),
          event.text,
        )
      } else answer.end(ENDS[event.reason], event.outputTokens, cachedTokens())
    }
  }

  private encode({ prompt, chat, raw }: RingPrompt): Int32Array {
    const { tokenizer, template } = this.options
    const text = Buffer.from(prompt.buffer, prompt.byteOffset, prompt.length).toString('utf8')
    if (!chat) return tokenizer.encode(text, { addSpecial: !raw, parseSpecial: false })
    if (!template) throw new LatticeError('template_invalid', 'The model has no chat template.')
    const written = template.render(JSON.parse(text), { addGenerationPrompt: true })
    return tokenizer.encode(written, { addSpecial: false, parseSpecial: true })
  }
}

const ENDS = {
  stop: 'ok',
  length: 'length',
  abort: 'cancelled',
  error: 'failed',
} as const satisfies Record<string, MessageCode>
