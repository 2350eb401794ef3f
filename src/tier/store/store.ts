// Owns the engine's side of a store: which prefixes it holds, and asking the pager to log changes.

import { closeSync } from 'node:fs'
import { assert, present } from '../../assert.ts'
import { mapAnonymous, viewMemory } from '../../ffi/libc.ts'
import type { KvStore, StoredPrefix } from '../../kv/tier.ts'
import * as words from '../shared.ts'
import { SEAL_WORDS, type TierShared } from '../shared.ts'
import type { OpenedStore } from './open.ts'
import { encodePut, encodeRemove, type PlaceSeal } from './records.ts'

export class DiskStore implements KvStore {
  readonly directory: string
  /** What the opening could not keep. */
  readonly lost: number
  private readonly opened: OpenedStore
  private readonly shared: TierShared
  private readonly newTicket: () => number
  private readonly found: readonly StoredPrefix[]
  private readonly children = new Map<number, Set<number>>()
  private readonly parents = new Map<number, number>()
  private nextId: number

  /** @param newTicket of the tier, so that its `poll` tells of them */
  constructor(opened: OpenedStore, shared: TierShared, newTicket: () => number) {
    this.opened = opened
    this.shared = shared
    this.newTicket = newTicket
    this.directory = opened.directory
    this.lost = opened.lost
    this.nextId = opened.nextId
    this.found = opened.prefixes
    for (const { id, parent } of this.found) this.link(id, parent)
    for (const [place, seal] of opened.seals) this.setSeal(place, seal)
  }

  entries(): readonly StoredPrefix[] {
    return this.found
  }

  put(prefix: Omit<StoredPrefix, 'id'>): { id: number; ticket: number } {
    const { parent, places } = prefix
    assert(parent === 0 || this.parents.has(parent), `prefix ${parent} is kept`)
    const id = this.nextId++
    const seals = Array.from(places, (place) => this.sealOf(place))
    const ticket = this.newTicket()
    this.link(id, parent)
    this.request(words.KEEP, ticket, id, encodePut({ ...prefix, id }, seals))
    return { id, ticket }
  }

  remove(id: number): void {
    const parent = present(this.parents.get(id), `prefix ${id}`)
    for (const child of this.children.get(id) ?? []) this.remove(child)
    this.children.get(parent)?.delete(id)
    this.children.delete(id)
    this.parents.delete(id)
    this.request(words.FORGET, 0, id, encodeRemove(id))
  }

  /** Another engine may open it. */
  close(): void {
    closeSync(this.opened.lockFd)
  }

  private link(id: number, parent: number): void {
    this.parents.set(id, parent)
    const siblings = this.children.get(parent)
    if (siblings) siblings.add(id)
    else this.children.set(parent, new Set([id]))
  }

  private request(kind: number, ticket: number, id: number, payload: Uint8Array): void {
    const bytes = 8 + payload.length
    const address = mapAnonymous(bytes)
    const block = Buffer.from(viewMemory(address, bytes))
    block.writeBigUInt64LE(BigInt(id), 0)
    block.set(payload, 8)
    this.shared.request({
      kind,
      ticket,
      region: (address % 2 ** 32) | 0,
      first: Math.floor(address / 2 ** 32),
      end: bytes,
      places: new Uint32Array(0),
    })
  }

  private sealOf(place: number): PlaceSeal {
    const { seals } = this.shared
    const at = place * SEAL_WORDS
    assert(seals[at + 3] === 1, `place ${place} holds a column`)
    const key = present(seals[at + 2], 'the key of a seal')
    const tag = Buffer.alloc(16)
    for (let i = 0; i < 4; i++) tag.writeUInt32LE(seals[at + 4 + i] ?? 0, i * 4)
    return {
      counter: (seals[at] ?? 0) + (seals[at + 1] ?? 0) * 2 ** 32,
      salt: present(this.opened.keys.saltOf(key), 'the salt of a key'),
      tag,
    }
  }

  private setSeal(place: number, { counter, salt, tag }: PlaceSeal): void {
    const { seals } = this.shared
    const at = place * SEAL_WORDS
    const key = this.opened.keys.columnKey(salt)
    seals.set([counter % 2 ** 32, Math.floor(counter / 2 ** 32), key, 1], at)
    const words = Buffer.from(tag)
    for (let i = 0; i < 4; i++) seals[at + 4 + i] = words.readUInt32LE(i * 4)
  }
}
