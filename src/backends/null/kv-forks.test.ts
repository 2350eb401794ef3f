// Catches forks, and beams that fork at every token, that lose a token, write to what others read,
// keep pages that they do not map, or promise memory to two of them.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { Random } from '../../../test/support/random.ts'
import { layerMajor, pagesFor } from '../../kv/layout.ts'
import { RegionTable, regionsFor } from '../../kv/regions.ts'
import { SlotTable } from '../../kv/slots.ts'
import { extendHash, NullKvMemory } from './kv-memory.ts'

/** 3.2 tokens a page: rows lie across pages. */
const LAYOUT = layerMajor({ layers: 2, rowBytes: 80, maxTokens: 60, pageBytes: 256 })
const SLOTS = 12

class Memory {
  readonly kv = new NullKvMemory(LAYOUT, SLOTS, regionsFor(SLOTS))
  readonly table: SlotTable
  /** By held slot: the hash after each of its tokens. */
  readonly live = new Map<number, number[]>()

  constructor(limitPages = 1e6) {
    const regions = new RegionTable(LAYOUT, regionsFor(SLOTS), limitPages, this.kv)
    this.table = new SlotTable(regions, SLOTS)
  }

  begin(tokens: readonly number[]): number {
    const slot = this.table.acquire(tokens.length)
    this.live.set(slot, [])
    for (const token of tokens) assert.ok(this.append(slot, token))
    return slot
  }

  append(slot: number, token: number): boolean {
    const hashes = this.live.get(slot)!
    if (!this.table.grow(slot, hashes.length + 1)) return false
    this.kv.append(slot, hashes.length, token)
    hashes.push(extendHash(hashes.at(-1) ?? 0, token))
    return true
  }

  fork(parent: number, tokens: number): number {
    const spans = this.table.spansOf(parent, tokens)
    this.table.pin(spans)
    const slot = this.table.acquireShared(spans)
    if (slot < 0) this.table.unpin(spans)
    else this.live.set(slot, this.live.get(parent)!.slice(0, tokens))
    return slot
  }

  /** Beam i goes on from what beam `parents[i]` has now. */
  reorder(beams: number[], parents: readonly number[], spansMax: number): number[] {
    const spare = beams.filter((_, i) => !parents.includes(i))
    const taken = new Set<number>()
    return parents.map((p) => {
      const parent = beams[p]!
      if (!taken.has(parent)) {
        taken.add(parent)
        return parent
      }
      const hashes = this.live.get(parent)!
      const slot = this.table.forkBeam(spare.pop() ?? -1, parent, hashes.length, spansMax)
      assert.ok(slot >= 0, 'a beam finds no region')
      this.live.set(slot, hashes.slice())
      return slot
    })
  }

  end(slot: number): void {
    this.live.delete(slot)
    this.table.retire(slot, 0)
  }

  /** Every token of every slot that has grown since it forked, and the pages of all. */
  check(grown: Iterable<number> = []): void {
    this.table.check()
    for (const slot of grown) {
      this.live.get(slot)!.forEach((hash, at) => assert.equal(this.kv.hashAt(slot, at), hash))
    }
    const { usedPages } = this.table
    assert.equal(this.kv.residentBytes(), usedPages * LAYOUT.shape.pageBytes)
  }

  close(): void {
    for (const slot of [...this.live.keys()]) this.end(slot)
    while (this.table.reclaim(Infinity) >= 0);
    this.check()
    assert.equal(this.table.usedPages, 0, 'pages are left behind')
  }
}

test('a fork that waits loses what its parent had, when that writes on or ends', () => {
  const operation = fc.record({
    kind: fc.constantFrom('fork', 'fork', 'write', 'write', 'write', 'end'),
    pick: fc.nat(),
    tokens: fc.nat(),
  })
  fc.assert(
    fc.property(fc.array(operation, { minLength: 5, maxLength: 60 }), (operations) => {
      const memory = new Memory()
      const grown = new Set([memory.begin([1, 2, 3, 4, 5, 6, 7])])
      operations.forEach(({ kind, pick, tokens }, token) => {
        const slots = [...memory.live.keys()]
        const slot = slots[pick % slots.length]!
        const length = memory.live.get(slot)!.length
        if (kind === 'fork') memory.fork(slot, 1 + (tokens % length))
        else if (kind === 'end' && slots.length > 1) {
          grown.delete(slot)
          memory.end(slot)
        } else if (kind === 'write' && length < 60) {
          memory.append(slot, token)
          grown.add(slot)
        }
        memory.check(grown)
      })
      memory.close()
    }),
    { seed: 11, numRuns: 500 },
  )
})

test('beams that fork at every token mix up their tokens, or keep pages nobody maps', () => {
  let compactions = 0
  for (let seed = 1; seed <= 60; seed++) {
    const random = new Random(seed)
    const memory = new Memory()
    const width = 2 + random.below(5)
    // With as many as there are pages in a range, none is ever too many.
    const spansMax = seed % 4 === 0 ? 19 : 1 + random.below(6)
    const prompt = 1 + random.below(12)
    const root = memory.begin(Array.from({ length: prompt }, (_, i) => i))
    let beams = memory.reorder([root], Array(width).fill(0), spansMax)
    for (let token = 0; token < 60 - prompt; token++) {
      for (const slot of beams) assert.ok(memory.append(slot, random.below(100)))
      memory.check(beams)
      const rest = pagesFor(LAYOUT, prompt + token + 1) - ((prompt * 80) >> 8) * 2
      const most = ((prompt * 80) >> 8) * 2 + width * rest
      assert.ok(memory.table.usedPages <= most, `seed ${seed}: ${memory.table.usedPages}, ${most}`)
      beams = memory.reorder(
        beams,
        beams.map(() => random.below(width)),
        spansMax,
      )
      memory.check()
      for (const slot of beams) {
        const spans = memory.table.spansOf(slot, prompt + token + 1)
        assert.ok(spans.length <= spansMax + 1, `seed ${seed}: ${spans.length} spans`)
      }
    }
    if (spansMax === 19) assert.equal(memory.table.compactions, 0, `seed ${seed}`)
    compactions += memory.table.compactions
    memory.close()
  }
  assert.ok(compactions > 100, `only ${compactions} forks were copied in part`)
})

test('two forks are promised the same page', () => {
  const memory = new Memory(16)
  // 7 tokens take 3 columns; 2 pages each. Five forks need one more each.
  const parent = memory.begin([1, 2, 3, 4, 5, 6, 7])
  const forks: number[] = []
  while (memory.table.fits(8, memory.table.spansOf(parent, 7))) forks.push(memory.fork(parent, 7))
  assert.equal(forks.length, 5)
  assert.equal(memory.table.usedPages, 6, 'a fork takes pages before it writes')
  for (const slot of forks) assert.ok(memory.append(slot, slot), 'a promised page is gone')
  assert.equal(memory.table.usedPages, 16)
  memory.check(forks)
  memory.close()
})
