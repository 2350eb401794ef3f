// Owns the unix socket that other engines of this machine join through: each that does is a replica
// of the interface, until it leaves, dies, or does not say for long that it is there.

import { lstatSync, unlinkSync } from 'node:fs'
import { connect, createServer, type Server, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import type { LatticeError } from '../errors.ts'
import type { DatagramReplica } from './datagram-server.ts'
import type { WireAnswer, WireRequest } from './exchange.ts'
import { refused } from './interface.ts'
import {
  JOIN_VERSION,
  type JoinFrame,
  readEnd,
  readHashes,
  readJoin,
  writeStart,
  writeWelcome,
} from './join-frames.ts'
import { JoinWire } from './join-wire.ts'
import { MESSAGE_CODES, type MessageCode, readTokens } from './protocol.ts'
import type { DatagramTenant } from './tenants.ts'

/** Of the datagram server, what replicas come to and go from. */
export interface JoinPlace {
  addReplica(replica: DatagramReplica): number
  removeReplica(index: number): void
  setReady(index: number, isReady: boolean): void
  setOtherLoad(index: number, requests: number): void
  publish(index: number, hash: bigint, isHeld: boolean): void
}

export interface HubOptions {
  path: string
  tenants: readonly DatagramTenant[]
  /** An engine that says nothing for so long is dead; 15 s unless given. */
  silenceMs?: number
  warn: (line: string) => void
}

/** Prompts that wait to be read by an engine: with more it gets no new ones until it has read. */
const WAITING_BYTES_MAX = 16 << 20
/** An engine says four times a second how much it has to do; one that does not is dead. */
const SILENCE_MS = 15_000
const LOOK_MS = 1_000
const DRAIN_LOOK_MS = 20
/** Of the owner only: who joins is told keys, and answers in the tenants' name. */
const UMASK = 0o177

const NO_USAGE = { promptTokens: 0, cachedTokens: 0, outputTokens: 0 }
const CODES = new Map<number, MessageCode>(
  Object.entries(MESSAGE_CODES).map(([name, code]) => [code, name as MessageCode]),
)

export class JoinHub {
  private readonly server: Server
  private readonly place: JoinPlace
  private readonly options: HubOptions
  private readonly members = new Set<Member>()
  private readonly timer: NodeJS.Timeout

  private constructor(server: Server, place: JoinPlace, options: HubOptions) {
    this.server = server
    this.place = place
    this.options = options
    server.on('connection', (socket) => this.admit(socket))
    this.timer = setInterval(() => {
      for (const member of this.members) member.look()
    }, LOOK_MS)
    this.timer.unref()
  }

  /** @throws LatticeError `net_refused` if the path cannot be listened on */
  static async listen(place: JoinPlace, options: HubOptions): Promise<JoinHub> {
    const { path } = options
    await removeStale(path)
    const server = createServer()
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    server.once('error', reject)
    const before = process.umask(UMASK)
    try {
      server.listen(path, resolve)
    } finally {
      process.umask(before)
    }
    try {
      await promise
    } catch (cause) {
      const why = cause instanceof Error ? cause.message : String(cause)
      const todo = 'Give --net-share a path in a directory that is yours.'
      throw refused(`No socket can be made at ${path}: ${why}.`, todo, cause)
    }
    server.off('error', reject)
    return new JoinHub(server, place, options)
  }

  /** Nobody joins any more; those that are there stay. */
  refuse(): void {
    this.server.close()
  }

  /** Resolves when nothing runs at any of those that are there. */
  async drain(): Promise<void> {
    while (this.members.values().some(({ isBusy }) => isBusy)) await sleep(DRAIN_LOOK_MS)
  }

  /** Resolves when the last replica is gone from the place. */
  async close(): Promise<void> {
    this.server.close()
    clearInterval(this.timer)
    const gone = [...this.members].map((member) => {
      member.dismiss()
      return member.gone.promise
    })
    await Promise.all(gone)
  }

  private admit(socket: Socket): void {
    const member = new Member(socket, this.place, this.options)
    this.members.add(member)
    void member.gone.promise.then(() => this.members.delete(member))
  }
}

/** One connection, and the replica that it is once it has said so. */
class Member implements DatagramReplica {
  readonly wire: JoinWire
  readonly gone = Promise.withResolvers<void>()
  model = ''
  process = 0
  private readonly place: JoinPlace
  private readonly options: HubOptions
  private index: number | undefined
  private readonly answers = new Map<number, WireAnswer>()
  private nextId = 1
  private heardMs = performance.now()
  private isFull = false
  private hasLeft = false

  constructor(socket: Socket, place: JoinPlace, options: HubOptions) {
    this.place = place
    this.options = options
    this.wire = new JoinWire(socket, {
      take: (frame) => this.take(frame),
      drained: () => this.setFull(false),
      lost: (why) => {
        this.lost(why)
        this.gone.resolve()
      },
    })
  }

  get isBusy(): boolean {
    return this.answers.size > 0
  }

  start(wire: WireRequest, _tenant: string, answer: WireAnswer): () => void {
    if (this.isFull || this.hasLeft) {
      answer.end(this.hasLeft ? 'no_replica' : 'busy', NO_USAGE)
      return () => {}
    }
    const id = this.nextId
    this.nextId = (this.nextId + 1) >>> 0
    this.answers.set(id, answer)
    this.wire.send('start', id, 0, writeStart(wire), wire.prompt)
    if (this.wire.unread > WAITING_BYTES_MAX) this.setFull(true)
    return () => {
      if (this.answers.delete(id)) this.wire.send('abort', id)
    }
  }

  /** Hangs up, which is nobody's fault. */
  dismiss(): void {
    this.hasLeft = true
    this.wire.hangUp()
  }

  /** Hangs up if nothing has come for long. */
  look(): void {
    const silentMs = performance.now() - this.heardMs
    if (silentMs < (this.options.silenceMs ?? SILENCE_MS)) return
    const what = `It has said nothing for ${(silentMs / 1000).toFixed(0)} s.`
    this.wire.hangUp(refused(what, 'Look at what that process does.'))
  }

  private take({ type, id, code, payload }: JoinFrame): void {
    this.heardMs = performance.now()
    const { index } = this
    if (type === 'join') return this.join(payload)
    if (index === undefined) return this.nonsense()
    if (type === 'tokens') {
      const told = readTokens(payload)
      if (!told) return this.nonsense()
      this.answers.get(id)?.tokens([...told.tokens], told.text)
    } else if (type === 'end') {
      const usage = readEnd(payload)
      const name = CODES.get(code)
      if (!usage || !name) return this.nonsense()
      const answer = this.answers.get(id)
      this.answers.delete(id)
      answer?.end(name, usage)
    } else if (type === 'held' || type === 'gone') {
      for (const hash of readHashes(payload)) this.place.publish(index, hash, type === 'held')
    } else if (type === 'load') this.place.setOtherLoad(index, id)
    else if (type === 'leave') {
      this.hasLeft = true
      this.place.setReady(index, false)
    } else this.nonsense()
  }

  private join(payload: Uint8Array): void {
    const joining = readJoin(payload)
    if (joining === undefined || this.index !== undefined) return this.nonsense()
    if (typeof joining === 'number') {
      const ours = `version ${JOIN_VERSION} is spoken here`
      return this.refuse(`It speaks version ${joining} of joining; ${ours}.`)
    }
    this.model = joining.model
    this.process = joining.process
    try {
      this.index = this.place.addReplica(this)
    } catch (thrown) {
      return this.refuse((thrown as LatticeError).message)
    }
    const { tenants } = this.options
    // Before any START: both go the same way.
    const told = tenants.map(({ index, name, keys }) => ({ index, name, key: keys[0] }))
    this.wire.send('welcome', this.index, 0, writeWelcome(told))
  }

  private refuse(why: string): void {
    this.wire.send('refused', 0, 0, Buffer.from(why))
    this.wire.end()
  }

  private nonsense(): void {
    this.wire.hangUp(
      refused('It sends what makes no sense.', 'Use the same version on both sides.'),
    )
  }

  private setFull(isFull: boolean): void {
    if (this.isFull === isFull || this.index === undefined) return
    this.isFull = isFull
    if (!this.hasLeft) this.place.setReady(this.index, !isFull)
  }

  private lost(why: LatticeError | undefined): void {
    const { index, process: pid } = this
    if (index === undefined) return
    this.index = undefined
    this.answers.clear()
    this.place.removeReplica(index)
    if (this.hasLeft && !why) return
    this.options.warn(
      `the engine of process ${pid} is gone from the datagram path` +
        (why ? `: ${why.message}` : '; what it ran ends as replica_lost'),
    )
  }
}

/** A socket whose process was killed stays behind as a file that nobody listens on. */
async function removeStale(path: string): Promise<void> {
  const stat = lstatSync(path, { throwIfNoEntry: false })
  if (!stat) return
  const todo = 'Give --net-share another path.'
  if (!stat.isSocket()) throw refused(`There is something else at ${path} than a socket.`, todo)
  const isAlive = await new Promise<boolean>((resolve) => {
    const probe = connect(path)
    probe.once('connect', () => {
      probe.destroy()
      resolve(true)
    })
    probe.once('error', () => resolve(false))
  })
  if (isAlive) throw refused(`Another process listens at ${path}.`, todo)
  unlinkSync(path)
}
