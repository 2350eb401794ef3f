// Owns the merge loop that BPE and SentencePiece share: of all adjacent pairs the best-ranked one
// merges first, the leftmost of equals, until no pair merges. O(n log n), whatever the text.

/**
 * Which pairs of symbols merge, how early, and into what: an open-addressing table, since a Map
 * keyed by pairs costs ten times as much to fill and to ask.
 */
export class PairTable {
  /** Four cells a slot: left, right, rank, merged. An empty slot's left is -1. */
  #cells: Int32Array
  #mask: number
  #count = 0

  constructor(expected: number) {
    let slots = 64
    while (slots < expected * 2) slots *= 2
    this.#cells = new Int32Array(slots * 4).fill(-1)
    this.#mask = slots - 1
  }

  get count(): number {
    return this.#count
  }

  /** Adds a pair, or replaces what it had. Symbols and ranks are not negative. */
  set(left: number, right: number, rank: number, merged: number): void {
    if (this.#count * 2 > this.#mask) this.#grow()
    const at = this.#slot(left, right)
    const cells = this.#cells
    if (cells[at] === -1) this.#count++
    cells[at] = left
    cells[at + 1] = right
    cells[at + 2] = rank
    cells[at + 3] = merged
  }

  /** The pair's slot for `rank` and `merged`, valid until the next `set`; -1 if it is not here. */
  find(left: number, right: number): number {
    const at = this.#slot(left, right)
    return this.#cells[at] === -1 ? -1 : at
  }

  rank(slot: number): number {
    return this.#cells[slot + 2]!
  }

  merged(slot: number): number {
    return this.#cells[slot + 3]!
  }

  #slot(left: number, right: number): number {
    const cells = this.#cells
    const mask = this.#mask
    let hash = Math.imul(left, 0x9e3779b1) ^ Math.imul(right, 0x85ebca6b)
    hash ^= hash >>> 15
    let at = (hash & mask) * 4
    while (cells[at] !== -1 && (cells[at] !== left || cells[at + 1] !== right)) {
      at = (at + 4) & (mask * 4 + 3)
    }
    return at
  }

  #grow(): void {
    const old = this.#cells
    this.#cells = new Int32Array(old.length * 2).fill(-1)
    this.#mask = this.#mask * 2 + 1
    for (let from = 0; from < old.length; from += 4) {
      if (old[from] === -1) continue
      this.#cells.set(old.subarray(from, from + 4), this.#slot(old[from]!, old[from + 1]!))
    }
  }
}

/** Says what a pair of adjacent symbols merges into. */
export interface PairSource {
  /** Rank (lower merges first) and merged symbol go to `out`; false if the pair stays apart. */
  lookup(left: number, right: number, out: PairMerge): boolean
}

export interface PairMerge {
  rank: number
  merged: number
}

/** Below this many symbols a scan for the minimum is faster than a heap. */
const SCAN_MAX = 32

/** Scratch memory kept between texts, in symbols: one huge text must not hold memory for good. */
export const SCRATCH_KEPT = 1 << 16

/** A queue entry is rank × this + position: one double, ordered as the merges are. */
const POSITIONS = 2 ** 27

/** Merges symbols in place. One instance serves one tokenizer; it keeps its scratch memory. */
export class Merger {
  readonly #source: PairSource
  readonly #found: PairMerge = { rank: 0, merged: 0 }
  /** Per position: rank of the pair that starts there (-1: none) and what it would become. */
  #rank = new Int32Array(256)
  #merged = new Int32Array(256)
  #next = new Int32Array(256)
  #previous = new Int32Array(256)
  #heap = new Float64Array(256)
  #heapSize = 0

  constructor(source: PairSource) {
    this.#source = source
  }

  /**
   * Merges the first `count` symbols until nothing merges.
   * @returns how many are left, at the front of `symbols`
   */
  merge(symbols: Int32Array, count: number): number {
    if (count < 2) return count
    if (this.#rank.length < count) this.#reserve(Math.max(count, this.#rank.length * 2))
    if (count <= SCAN_MAX) return this.#mergeShort(symbols, count)
    const left = this.#mergeLong(symbols, count)
    if (this.#rank.length > SCRATCH_KEPT) this.#reserve(SCRATCH_KEPT)
    return left
  }

  #mergeShort(symbols: Int32Array, count: number): number {
    const rank = this.#rank
    const merged = this.#merged
    for (let i = 0; i + 1 < count; i++) this.#look(symbols[i]!, symbols[i + 1]!, i)
    for (;;) {
      let best = -1
      for (let i = 0; i + 1 < count; i++) {
        if (rank[i]! >= 0 && (best < 0 || rank[i]! < rank[best]!)) best = i
      }
      if (best < 0) return count
      symbols[best] = merged[best]!
      count--
      for (let i = best + 1; i < count; i++) {
        symbols[i] = symbols[i + 1]!
        rank[i] = rank[i + 1]!
        merged[i] = merged[i + 1]!
      }
      if (best > 0) this.#look(symbols[best - 1]!, symbols[best]!, best - 1)
      if (best + 1 < count) this.#look(symbols[best]!, symbols[best + 1]!, best)
    }
  }

  #mergeLong(symbols: Int32Array, count: number): number {
    const rank = this.#rank
    const next = this.#next
    const previous = this.#previous
    this.#heapSize = 0
    for (let i = 0; i < count; i++) {
      next[i] = i + 1
      previous[i] = i - 1
      rank[i] = -1
      if (i + 1 < count) this.#enqueue(symbols[i]!, symbols[i + 1]!, i)
    }
    while (this.#heapSize > 0) {
      const entry = this.#pop()
      const at = entry % POSITIONS
      // The pair queued may have been merged away or have grown since: then its rank is another.
      if (rank[at] !== (entry - at) / POSITIONS) continue
      const gone = next[at]!
      symbols[at] = this.#merged[at]!
      rank[at] = -1
      rank[gone] = -1
      const after = next[gone]!
      next[at] = after
      if (after < count) {
        previous[after] = at
        this.#enqueue(symbols[at]!, symbols[after]!, at)
      }
      const before = previous[at]!
      if (before >= 0) this.#enqueue(symbols[before]!, symbols[at]!, before)
    }
    let kept = 0
    for (let i = 0; i < count; i = next[i]!) symbols[kept++] = symbols[i]!
    return kept
  }

  #look(left: number, right: number, at: number): void {
    const found = this.#source.lookup(left, right, this.#found)
    this.#rank[at] = found ? this.#found.rank : -1
    if (found) this.#merged[at] = this.#found.merged
  }

  #enqueue(left: number, right: number, at: number): void {
    this.#look(left, right, at)
    if (this.#rank[at]! >= 0) this.#push(this.#rank[at]! * POSITIONS + at)
  }

  #push(entry: number): void {
    if (this.#heapSize === this.#heap.length) {
      const larger = new Float64Array(this.#heap.length * 2)
      larger.set(this.#heap)
      this.#heap = larger
    }
    const heap = this.#heap
    let at = this.#heapSize++
    while (at > 0) {
      const parent = (at - 1) >> 1
      if (heap[parent]! <= entry) break
      heap[at] = heap[parent]!
      at = parent
    }
    heap[at] = entry
  }

  #pop(): number {
    const heap = this.#heap
    const top = heap[0]!
    const last = heap[--this.#heapSize]!
    const size = this.#heapSize
    let at = 0
    for (;;) {
      let child = at * 2 + 1
      if (child >= size) break
      if (child + 1 < size && heap[child + 1]! < heap[child]!) child++
      if (heap[child]! >= last) break
      heap[at] = heap[child]!
      at = child
    }
    heap[at] = last
    return top
  }

  #reserve(size: number): void {
    this.#rank = new Int32Array(size)
    this.#merged = new Int32Array(size)
    this.#next = new Int32Array(size)
    this.#previous = new Int32Array(size)
    this.#heap = new Float64Array(size)
  }
}
