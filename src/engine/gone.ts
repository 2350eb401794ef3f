// Owns which sequences nobody waits for any more because the kernel has seen their client go
// (bpf/disconnect.bpf.c): the engine's thread looks between two steps, without a system call and
// without the thread that owns the connection.

import { keyOf } from '../net/connection-key.ts'
import type { ClientConnection } from './api.ts'

/** struct gone */
const RECORD = { bytes: 40, ktimeNs: 0, ip6: 8, ip4: 24, isIp6: 28, port: 30 } as const
/** Connections that ended lately: a prompt may still be on its way from the other thread. */
const REMEMBERED_MAX = 4096

type Take = (view: DataView, at: number, bytes: number) => void

interface Waiting {
  sinceNs: bigint
  ids: Set<number>
}

export class GoneClients {
  private readonly drain: (take: Take) => void
  private readonly waiting = new Map<string, Waiting>()
  private readonly keys = new Map<number, string>()
  /** When they ended; the oldest first. */
  private readonly gone = new Map<string, bigint>()
  private aborts: number[] = []

  /** @param drain hands over what the kernel has written since the last time */
  constructor(drain: (take: Take) => void) {
    this.drain = drain
  }

  submitted(ids: readonly number[], connection: ClientConnection | undefined): void {
    if (!connection) return
    const { key, sinceNs } = connection
    const waiting = this.waiting.get(key) ?? { sinceNs, ids: new Set() }
    waiting.sinceNs = sinceNs
    this.waiting.set(key, waiting)
    for (const id of ids) {
      this.keys.set(id, key)
      waiting.ids.add(id)
    }
    const endedNs = this.gone.get(key)
    if (endedNs !== undefined && endedNs >= sinceNs) this.aborts.push(...ids)
  }

  /** A fork is for the same client. */
  forked(parent: number, id: number): void {
    const key = this.keys.get(parent)
    if (key === undefined) return
    this.keys.set(id, key)
    this.waiting.get(key)?.ids.add(id)
  }

  finished(id: number): void {
    const key = this.keys.get(id)
    if (key === undefined) return
    this.keys.delete(id)
    const waiting = this.waiting.get(key)
    waiting?.ids.delete(id)
    if (waiting?.ids.size === 0) this.waiting.delete(key)
  }

  /** Aborts what nobody waits for any more. */
  look(abort: (id: number) => void): void {
    this.drain((view, at, bytes) => {
      if (bytes >= RECORD.bytes) this.take(view, at)
    })
    if (this.aborts.length === 0) return
    const ids = this.aborts
    this.aborts = []
    for (const id of ids) if (this.keys.has(id)) abort(id)
  }

  private take(view: DataView, at: number): void {
    const address = new Uint8Array(16)
    const bytes = new Uint8Array(view.buffer, view.byteOffset + at)
    if (view.getUint16(at + RECORD.isIp6, true)) {
      address.set(bytes.subarray(RECORD.ip6, RECORD.ip6 + 16))
    } else {
      address.fill(255, 10, 12)
      address.set(bytes.subarray(RECORD.ip4, RECORD.ip4 + 4), 12)
    }
    const key = keyOf(address, view.getUint16(at + RECORD.port, true))
    const endedNs = view.getBigUint64(at + RECORD.ktimeNs, true)
    const waiting = this.waiting.get(key)
    if (waiting && endedNs >= waiting.sinceNs) this.aborts.push(...waiting.ids)
    this.gone.delete(key)
    this.gone.set(key, endedNs)
    for (const oldest of this.gone.keys()) {
      if (this.gone.size <= REMEMBERED_MAX) break
      this.gone.delete(oldest)
    }
  }
}
