// Owns which prefixes of a store's log still stand: one falls when it is dropped, when what it
// continues falls, or when one of its places was written again for another.

import type { StoredPrefix } from '../../kv/tier.ts'
import type { PlaceSeal } from './records.ts'

export interface Standing {
  prefix: StoredPrefix
  seals: readonly PlaceSeal[]
  /** Of its frame in the log. */
  offset: number
  bytes: number
}

/** What a place holds by the latest record, and for whom. */
interface Claim {
  seal: PlaceSeal
  ids: number[]
}

export class PrefixIndex {
  readonly standing = new Map<number, Standing>()
  /** Those that lie beyond the capacity, or continue one that does. */
  readonly beyond = new Set<number>()
  private readonly children = new Map<number, number[]>()
  private readonly claims = new Map<number, Claim>()
  private readonly capacity: number

  /** @param capacity prefixes with places beyond it do not stand */
  constructor(capacity: number) {
    this.capacity = capacity
  }

  /** @returns how many fell, itself among them if what it continues does not stand */
  put(added: Standing): number {
    const { prefix, seals } = added
    const fallen = this.claim(prefix, seals)
    if (this.isBeyond(prefix)) {
      this.beyond.add(prefix.id)
      return fallen
    }
    if (!this.continues(prefix)) return fallen + 1
    this.standing.set(prefix.id, added)
    const siblings = this.children.get(prefix.parent)
    if (siblings) siblings.push(prefix.id)
    else this.children.set(prefix.parent, [prefix.id])
    return fallen
  }

  /** @returns how many fell: the prefix and all that continue it */
  drop(id: number): number {
    this.beyond.delete(id)
    if (!this.standing.delete(id)) return 0
    const children = this.children.get(id) ?? []
    this.children.delete(id)
    return children.reduce((fallen, child) => fallen + this.drop(child), 1)
  }

  /** By place: what proves its content. */
  seals(): Map<number, PlaceSeal> {
    const seals = new Map<number, PlaceSeal>()
    for (const { prefix, seals: own } of this.standing.values()) {
      own.forEach((seal, i) => seals.set(prefix.places[i] ?? 0, seal))
    }
    return seals
  }

  /** Whoever had a place with other content was dropped, unheard. */
  private claim({ id, places }: StoredPrefix, seals: readonly PlaceSeal[]): number {
    let fallen = 0
    seals.forEach((seal, i) => {
      const place = places[i] ?? 0
      const claim = this.claims.get(place)
      if (claim && Buffer.from(claim.seal.tag).equals(seal.tag)) claim.ids.push(id)
      else {
        for (const other of claim?.ids ?? []) fallen += this.drop(other)
        this.claims.set(place, { seal, ids: [id] })
      }
    })
    return fallen
  }

  private isBeyond({ parent, places }: StoredPrefix): boolean {
    return this.beyond.has(parent) || places.some((place) => place >= this.capacity)
  }

  /** Whether a prefix begins at the first token, or where one that stands ends. */
  private continues({ parent, tenant, from, firstColumn }: StoredPrefix): boolean {
    if (parent === 0) return from === 0 && firstColumn === 0
    const before = this.standing.get(parent)?.prefix
    if (before?.tenant !== tenant) return false
    const columns = before.firstColumn + before.places.length
    return before.from + before.tokens.length === from && firstColumn <= columns
  }
}
