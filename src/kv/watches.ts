// Owns watched prefixes: somebody wants to know when they are not cached any more. A watch stays
// with the node that its last token lies in, for as long as that is there.

import { present } from '../assert.ts'
import type { PrefixNode, Watch } from './prefix-node.ts'

export class WatchTable {
  private readonly roots: ReadonlyMap<string, PrefixNode>
  private forgotten: string[] = []

  /** @param roots of the tenants' prefixes */
  constructor(roots: ReadonlyMap<string, PrefixNode>) {
    this.roots = roots
  }

  /**
   * Whether the first tokens of a prompt are cached; if so, `take` has the id once they are not
   * any more. It is no use: what is watched is forgotten as if it were not.
   */
  watch(tenant: string, tokens: Int32Array, { id, length }: Watch): boolean {
    let node = this.roots.get(tenant)
    let at = 0
    while (node && at < length) {
      const child = node.children.get(present(tokens[at], 'a token'))
      const end = Math.min(length, at + (child?.tokens.length ?? 0))
      for (let i = at; i < end; i++) if (child?.tokens[i - at] !== tokens[i]) return false
      at = end
      node = child
    }
    if (!node?.parent) return false
    node.watches.push({ id, length })
    return true
  }

  /** A node was cut in two. */
  split(upper: PrefixNode, lower: PrefixNode): void {
    const all = lower.watches
    upper.watches = all.filter(({ length }) => length <= lower.from)
    lower.watches = all.filter(({ length }) => length > lower.from)
  }

  /** A node was forgotten. */
  went({ watches }: PrefixNode): void {
    for (const { id } of watches) this.forgotten.push(id)
  }

  /** Ids of those that were forgotten since the last time. */
  take(): string[] {
    const ids = this.forgotten
    this.forgotten = []
    return ids
  }
}
