// Catches sharing that the kernel does not see: a fork that copies, a write that reaches another
// sequence, pages that go with their first owner or stay after their last. The kernel is real.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import { Random } from '../../../test/support/random.ts'
import { viewMemory } from '../../ffi/libc.ts'
import { layerMajor, pagesFor } from '../../kv/layout.ts'
import { RegionTable, regionsFor } from '../../kv/regions.ts'
import { SlotTable } from '../../kv/slots.ts'
import { HostKvMemory } from './kv-memory.ts'

/** SmolLM2-135M's; a page holds 5⅓ rows. */
const LAYOUT = layerMajor({ layers: 30, rowBytes: 768, maxTokens: 4096, pageBytes: 4096 })
const SLOTS = 8
const PAGE = 4096

class Memory {
  readonly kv = new HostKvMemory(LAYOUT, SLOTS, regionsFor(SLOTS))
  readonly table = new SlotTable(new RegionTable(LAYOUT, regionsFor(SLOTS), 1e6, this.kv), SLOTS)

  begin(tokens: number, mark: number): number {
    const slot = this.table.acquire(tokens)
    this.write(slot, 0, tokens, mark)
    return slot
  }

  fork(parent: number, tokens: number): number {
    const spans = this.table.spansOf(parent, tokens)
    this.table.pin(spans)
    return this.table.acquireShared(spans)
  }

  /** Marks every row's first and last four bytes, in each layer. */
  write(slot: number, from: number, to: number, mark: number): void {
    assert.ok(this.table.grow(slot, to))
    for (const row of this.rows(slot, from, to)) {
      row[0] = mark
      row[row.length - 1] = mark
    }
  }

  assertHolds(slot: number, from: number, to: number, mark: number): void {
    for (const row of this.rows(slot, from, to)) {
      assert.equal(row[0], mark)
      assert.equal(row.at(-1), mark)
    }
  }

  /** Resident pages, which must be those that are accounted for. */
  pages(): number {
    this.table.check()
    assert.equal(this.kv.residentBytes(), this.table.usedPages * PAGE)
    return this.table.usedPages
  }

  private *rows(slot: number, from: number, to: number): Generator<Int32Array> {
    const { layers, rowBytes } = LAYOUT.shape
    for (let layer = 0; layer < layers; layer++) {
      const address = this.kv.address + slot * LAYOUT.slotBytes + layer * LAYOUT.layerStride
      const view = viewMemory(address + from * rowBytes, (to - from) * rowBytes)
      for (let i = 0; i < to - from; i++) yield new Int32Array(view, i * rowBytes, rowBytes / 4)
    }
  }
}

test('a fork copies before it writes, more than the boundary page, or writes to the parent', () => {
  const memory = new Memory()
  const parent = memory.begin(2000, 1)
  assert.equal(memory.pages(), pagesFor(LAYOUT, 2000))
  // 2,000 rows of 768 bytes are 375 pages exactly; 1,999 end within one.
  const whole = memory.fork(parent, 2000)
  assert.equal(memory.pages(), pagesFor(LAYOUT, 2000))
  const within = memory.fork(parent, 1999)
  assert.equal(memory.pages(), pagesFor(LAYOUT, 2000))
  // The parent writes on, in the very page that the fork has not copied yet.
  memory.write(parent, 2000, 2010, 4)
  memory.write(whole, 2000, 2010, 2)
  memory.write(within, 1999, 2010, 3)
  memory.assertHolds(parent, 0, 2000, 1)
  memory.assertHolds(parent, 2000, 2010, 4)
  memory.assertHolds(whole, 0, 2000, 1)
  memory.assertHolds(whole, 2000, 2010, 2)
  memory.assertHolds(within, 0, 1999, 1)
  memory.assertHolds(within, 1999, 2010, 3)
  // Two pages a layer of its own for the two that go on after page 375; one more from within it.
  assert.equal(memory.pages(), (375 + 2 + 2 + 3) * 30)
  memory.kv.close()
})

test('pages go with the parent, or stay after the last of a family', () => {
  const memory = new Memory()
  const parent = memory.begin(1000, 1)
  const child = memory.fork(parent, 900)
  memory.write(child, 900, 1000, 2)
  const grandchild = memory.fork(child, 950)
  memory.write(grandchild, 950, 1000, 3)
  // Below the child's own fork point, but within the page where that lies.
  const cousin = memory.fork(child, 899)
  memory.write(cousin, 899, 1000, 4)
  memory.table.retire(parent, 0)
  memory.table.retire(child, 0)
  memory.pages()
  memory.assertHolds(grandchild, 0, 900, 1)
  memory.assertHolds(grandchild, 900, 950, 2)
  memory.assertHolds(grandchild, 950, 1000, 3)
  memory.assertHolds(cousin, 0, 899, 1)
  memory.assertHolds(cousin, 899, 1000, 4)
  // A newcomer in the parent's slot gets other memory, all zeros.
  const next = memory.table.acquire(10)
  assert.ok(memory.table.grow(next, 10))
  memory.assertHolds(next, 0, 10, 0)
  memory.write(next, 0, 10, 5)
  memory.assertHolds(cousin, 0, 899, 1)
  for (const slot of [grandchild, cousin, next]) memory.table.retire(slot, 0)
  while (memory.table.reclaim(Infinity) >= 0);
  assert.equal(memory.pages(), 0)
  memory.kv.close()
})

test('a beam reads the tokens of another after its slot was mapped anew', () => {
  const seed = 9
  const random = new Random(seed)
  const memory = new Memory()
  const root = memory.begin(100, 0)
  const marks = new Map([[root, [] as number[]]])
  let beams = [root]
  for (let length = 100; length < 180; length++) {
    const parents = [0, 1, 2, 3].map(() => random.below(beams.length))
    const spare = beams.filter((_, i) => !parents.includes(i))
    const first = (i: number) => parents.indexOf(parents[i]!) === i
    const next = parents.map((p, i) => {
      const parent = beams[p]!
      if (first(i)) return parent
      return memory.table.forkBeam(spare.pop() ?? -1, parent, length, 4)
    })
    const histories = parents.map((p) => marks.get(beams[p]!)!.slice())
    beams = next
    beams.forEach((slot, i) => {
      memory.write(slot, length, length + 1, 1000 * length + i)
      marks.set(slot, [...histories[i]!, 1000 * length + i])
    })
    for (const slot of beams) {
      memory.assertHolds(slot, 0, 100, 0)
      marks.get(slot)!.forEach((mark, i) => memory.assertHolds(slot, 100 + i, 101 + i, mark))
    }
    memory.pages()
  }
  assert.ok(memory.table.compactions > 0, `seed ${seed}: no fork was copied in part`)
  memory.kv.close()
})

test('forks take mappings that they do not give back, or more than one a layer', () => {
  const memory = new Memory()
  const mappings = () =>
    readFileSync('/proc/self/maps', 'utf8').split('memfd:lattice-kv').length - 1
  const before = mappings()
  const parent = memory.begin(2000, 1)
  const children = [1, 2, 3].map(() => memory.fork(parent, 1990))
  assert.ok(mappings() <= before + 2 * 30 * 3 + 4)
  for (const slot of [parent, ...children]) memory.table.retire(slot, 0)
  while (memory.table.reclaim(Infinity) >= 0);
  for (let i = 0; i < SLOTS; i++) memory.begin(10, i)
  assert.ok(mappings() <= SLOTS + before, `${mappings()} mappings after ${before}`)
  memory.kv.close()
})
