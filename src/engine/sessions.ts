// Owns sessions: what is cached of each conversation, from its first token to the end of a path in
// the prefix tree. They come and go with the tree; here they are named, and moved when asked.

import { createHash } from 'node:crypto'
import type { Level } from '../kv/outside.ts'
import { pagesOf } from '../kv/regions.ts'
import { columnsOf } from '../kv/eviction-queue.ts'
import type { PrefixCache } from '../kv/prefix.ts'
import type { PrefixNode } from '../kv/prefix-node.ts'
import type { SlotTable } from '../kv/slots.ts'
import type { SessionMove, SessionSnapshot } from './api.ts'
import type { Offload } from './offload.ts'

/** Hex digits of the SHA-256 of a session's tokens that name it. */
const ID_DIGITS = 16

export class Sessions {
  private readonly slots: SlotTable
  private readonly cache: PrefixCache
  private readonly offload: Offload | undefined

  constructor(slots: SlotTable, cache: PrefixCache, offload: Offload | undefined) {
    this.slots = slots
    this.cache = cache
    this.offload = offload
  }

  /** A tenant's, the latest used first. */
  list(tenant: string, nowMs: number): SessionSnapshot[] {
    const ends = this.ends(tenant).toSorted((a, b) => b.usedAt - a.usedAt)
    return ends.map((end) => this.describe(end, nowMs))
  }

  moveOut(tenant: string, id: string): SessionMove {
    const end = this.find(tenant, id)
    if (!end) return 'unknown'
    if (!this.offload?.cold) return 'impossible'
    if (!this.offload.cold.demoteFrom(end)) return 'busy'
    return end.region < 0 ? 'done' : 'moving'
  }

  moveIn(tenant: string, id: string): SessionMove {
    const end = this.find(tenant, id)
    if (!end) return 'unknown'
    if (end.region >= 0) return end.coming ? 'moving' : 'done'
    const tokens = tokensOf(end)
    return this.offload?.fetch(tenant, tokens, tokens.length, true) ? 'moving' : 'busy'
  }

  private find(tenant: string, id: string): PrefixNode | undefined {
    return this.ends(tenant).find((end) => nameOf(tokensOf(end)) === id)
  }

  private ends(tenant: string): PrefixNode[] {
    return [...this.cache.nodes()].filter(
      (node) => node.tenant === tenant && node.children.size === 0,
    )
  }

  private describe(end: PrefixNode, nowMs: number): SessionSnapshot {
    const { regions, layout } = this.slots
    let [pages, outPages] = [0, 0]
    let level: Level = 'host'
    for (let node = end; node.parent; node = node.parent) {
      const count = pagesOf(layout, columnsOf(regions, node))
      if (node.region >= 0 && !node.coming) pages += count
      else {
        outPages += count
        if (this.offload?.levelOf(node) === 'disk') level = 'disk'
      }
    }
    const durable = this.offload?.isDurable(end)
    return {
      id: nameOf(tokensOf(end)),
      tokens: end.from + end.tokens.length,
      pages,
      outPages,
      bytes: (pages + outPages) * layout.shape.pageBytes,
      where: outPages === 0 ? 'memory' : pages === 0 ? level : 'both',
      ...(durable !== undefined && { durable }),
      idleMs: nowMs - end.usedMs,
    }
  }
}

function tokensOf(end: PrefixNode): Int32Array {
  const tokens = new Int32Array(end.from + end.tokens.length)
  for (let node = end; node.parent; node = node.parent) tokens.set(node.tokens, node.from)
  return tokens
}

function nameOf(tokens: Int32Array): string {
  const bytes = new Uint8Array(tokens.buffer, tokens.byteOffset, tokens.byteLength)
  return `session-${createHash('sha256').update(bytes).digest('hex').slice(0, ID_DIGITS)}`
}
