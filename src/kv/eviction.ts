// Owns what a cached prefix is worth when memory is short: whoever is worth least goes first.
//
//   lru   the longest unused goes
//   lfu   the least used goes; uses of long ago count less (LFU-DA, Arlitt et al. 1999)
//   cost  what is cheapest to compute again, for each page that it gives back and each use, goes
//         (GreedyDual-Size-Frequency, Cherkasova 1998)

export interface PrefixUse {
  /** Of the cache's own clock, which ticks with every use. */
  usedAt: number
  /** Prompts that began with it, the one that it came from included. */
  uses: number
  /** Position of its first token. */
  from: number
  tokens: { readonly length: number }
}

export interface EvictionPolicy {
  /**
   * Whether worth counts from the worth of the last prefix that went: what was worth much long ago
   * is overtaken by what is worth something now.
   */
  readonly ages: boolean
  /** @param pages that go back with it, more than 0 */
  worth(prefix: PrefixUse, pages: number): number
}

/** Where attention over what came before costs a token as much as all the rest does. */
const ATTENTION_PARITY = 4096

export const EVICTION_POLICIES = {
  lru: { ages: false, worth: ({ usedAt }) => usedAt },
  lfu: { ages: true, worth: ({ uses }) => uses },
  cost: {
    ages: true,
    worth: ({ uses, from, tokens }, pages) => (uses * recomputeCost(from, tokens.length)) / pages,
  },
} as const satisfies Record<string, EvictionPolicy>

export type EvictionName = keyof typeof EVICTION_POLICIES

export const EVICTION_DEFAULT: EvictionName = 'cost'

export const EVICTION_NAMES = Object.keys(EVICTION_POLICIES) as EvictionName[]

/** What computing `count` tokens from position `from` on takes, in tokens at position 0. */
export function recomputeCost(from: number, count: number): number {
  return count * (1 + (from + count / 2) / ATTENTION_PARITY)
}
