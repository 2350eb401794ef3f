// Owns an engine's place behind an interface that another process owns: it joins through that
// process's socket, answers prompts, says what it holds and how much it has to do, and joins again
// when the owner was gone.

import { connect } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Engine } from '../engine/api.ts'
import type { LatticeError } from '../errors.ts'
import type { ChatTemplate } from '../text/chat-template.ts'
import type { Tokenizer } from '../text/tokenizer.ts'
import { EngineAnswers } from './engine-answers.ts'
import { refused } from './interface.ts'
import {
  type JoinFrame,
  type JoinTenant,
  readStart,
  readWelcome,
  writeEnd,
  writeHashes,
  writeJoin,
} from './join-frames.ts'
import { JoinWire } from './join-wire.ts'
import { PrefixNews } from './prefix-news.ts'
import { MESSAGE_CODES, writeTokens } from './protocol.ts'

export interface JoinOptions {
  /** Of the owner's socket. */
  path: string
  engine: Engine
  tokenizer: Tokenizer
  template: ChatTemplate | undefined
  /** Sequences that run or wait in the engine, whoever asked for them. */
  load: () => number
  /** The engine has a prefix cache: what is in it is published. */
  publishes: boolean
  warn: (line: string) => void
}

const LOAD_MS = 250
const REJOIN_MS = 1_000
/** An owner that has not answered after this long is none. */
const ANSWER_MS = 10_000
/** What was answered has so long to get to the owner at the end. */
const FLUSH_MS = 5_000
/** Ids of a frame of tokens: what its count can say. */
const TOKENS_MAX = 65_535

export class JoinedReplica {
  private readonly options: JoinOptions
  private readonly answers: EngineAnswers
  private news: PrefixNews | undefined
  private tenants: readonly JoinTenant[] = []
  private wire: JoinWire | undefined
  private readonly aborts = new Map<number, () => void>()
  private pending: { held: boolean; hashes: bigint[] } | undefined
  private readonly timer: NodeJS.Timeout
  private leaving = false
  private closed = false

  private constructor(options: JoinOptions) {
    this.options = options
    const { engine, tokenizer, template, warn } = options
    this.answers = new EngineAnswers({
      ...{ engine, tokenizer, template, warn },
      // With no load at all it would be given everything.
      onStopped: () => this.refuse(),
      onComputed: (wire, tokens, tenant) => this.news?.computed(wire, tokens, tenant),
    })
    this.timer = setInterval(() => this.sayLoad(), LOAD_MS)
    this.timer.unref()
  }

  /**
   * Joins, and stays joined until it is closed: whenever the owner is back.
   * @throws LatticeError `net_refused` if nobody listens there, or nobody more may join
   */
  static async join(options: JoinOptions): Promise<JoinedReplica> {
    const replica = new JoinedReplica(options)
    try {
      await replica.connect()
      return replica
    } catch (thrown) {
      clearInterval(replica.timer)
      throw thrown
    }
  }

  /** Asks for no more prompts; those that run go on. */
  refuse(): void {
    if (this.leaving) return
    this.leaving = true
    this.wire?.send('leave')
  }

  /** Lets what was answered get to the owner, then leaves. */
  async close(): Promise<void> {
    this.refuse()
    this.closed = true
    clearInterval(this.timer)
    this.news?.end()
    const late = performance.now() + FLUSH_MS
    while (this.aborts.size > 0 && performance.now() < late) await sleep(5)
    // The words of this turn are sent at its end.
    await new Promise((resolve) => setImmediate(resolve))
    this.wire?.end()
  }

  private async connect(): Promise<void> {
    const { path, engine } = this.options
    const socket = connect(path)
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    const wire = new JoinWire(socket, {
      take: (frame) => {
        if (frame.type === 'welcome') this.welcome(frame.payload, wire)
        if (frame.type === 'welcome') resolve()
        else if (frame.type === 'refused') {
          const why = Buffer.from(frame.payload).toString('utf8')
          reject(refused(why, 'Look at `lattice net status` of the process that listens there.'))
        } else this.take(frame)
      },
      lost: (why) => {
        reject(unreachable(path, why))
        if (this.wire === wire) this.lost(why)
      },
    })
    wire.send('join', 0, 0, writeJoin({ model: engine.model.id, process: process.pid }))
    const late = refused('It does not answer.', 'Look at what that process does.')
    const timer = setTimeout(() => wire.hangUp(late), ANSWER_MS)
    await promise.finally(() => clearTimeout(timer))
  }

  private welcome(payload: Uint8Array, wire: JoinWire): void {
    const tenants = readWelcome(payload)
    if (!tenants) return wire.hangUp(nonsense())
    // Joined again while it was being closed.
    if (this.closed) return wire.end()
    this.wire = wire
    // A key that was changed makes other hashes of the same prefixes.
    const isSame = JSON.stringify(tenants.map(show)) === JSON.stringify(this.tenants.map(show))
    this.tenants = tenants
    if (this.options.publishes && !(isSame && this.news)) {
      const keyed = tenants.map(({ index, key }) => ({ index, keys: [key, key] as const }))
      this.news = new PrefixNews(this.options.engine, keyed, (hash, isHeld) => {
        this.publish(hash, isHeld)
      })
    }
    this.news?.begin()
    this.sayLoad()
    if (this.leaving) wire.send('leave')
  }

  private take({ type, id, payload }: JoinFrame): void {
    if (type === 'start') this.start(id, payload)
    else if (type === 'abort') {
      const abort = this.aborts.get(id)
      this.aborts.delete(id)
      abort?.()
    } else this.wire?.hangUp(nonsense())
  }

  private start(id: number, payload: Uint8Array): void {
    const { wire } = this
    const request = readStart(payload)
    if (!wire || !request) return wire?.hangUp(nonsense())
    const tenant = this.tenants.find(({ index }) => index === request.tenant)?.name ?? 'default'
    let isOver = false
    // The wire that it came by: what comes after is of another owner.
    const abort = this.answers.start({ ...request, route: 0 }, tenant, {
      tokens: (ids, text) => {
        let rest = ids
        for (; rest.length > TOKENS_MAX; rest = rest.slice(TOKENS_MAX)) {
          wire.send('tokens', id, 0, writeTokens(rest.slice(0, TOKENS_MAX), ''))
        }
        wire.send('tokens', id, 0, writeTokens(rest, text))
      },
      end: (code, usage) => {
        isOver = true
        if (this.wire === wire) this.aborts.delete(id)
        wire.send('end', id, MESSAGE_CODES[code], writeEnd(usage))
      },
    })
    if (!isOver) this.aborts.set(id, abort)
  }

  /** Many at once are one frame: a prompt has up to 13 prefixes. */
  private publish(hash: bigint, isHeld: boolean): void {
    if (this.pending?.held === isHeld) {
      this.pending.hashes.push(hash)
      return
    }
    this.flush()
    this.pending = { held: isHeld, hashes: [hash] }
    queueMicrotask(() => this.flush())
  }

  private flush(): void {
    const { pending } = this
    this.pending = undefined
    if (!pending) return
    this.wire?.send(pending.held ? 'held' : 'gone', 0, 0, writeHashes(pending.hashes))
  }

  /** What the owner does not know of; it counts its own. */
  private sayLoad(): void {
    this.wire?.send('load', Math.max(0, this.options.load() - this.answers.running))
  }

  private lost(why: LatticeError | undefined): void {
    this.wire = undefined
    this.news?.end()
    for (const abort of this.aborts.values()) abort()
    this.aborts.clear()
    if (this.closed) return
    this.options.warn(
      `the owner of the datagram path at ${this.options.path} is gone` +
        `${why ? ` (${why.message})` : ''}: trying to join again`,
    )
    void this.rejoin()
  }

  private async rejoin(): Promise<void> {
    while (!this.closed) {
      await sleep(REJOIN_MS, undefined, { ref: false })
      const isBack = await this.connect().then(
        () => true,
        () => false,
      )
      if (isBack) return this.options.warn(`joined the datagram path at ${this.options.path} again`)
    }
  }
}

function show({ index, name, key }: JoinTenant): string {
  return `${index} ${name} ${Buffer.from(key).toString('hex')}`
}

function nonsense(): LatticeError {
  return refused('The owner sends what makes no sense.', 'Use the same version on both sides.')
}

function unreachable(path: string, why: LatticeError | undefined): LatticeError {
  return refused(
    `Nothing can be joined at ${path}: ${why?.message ?? 'it was hung up.'}`,
    'Start the server that owns the interface with --net-share and this path, as the same user.',
    why,
  )
}
