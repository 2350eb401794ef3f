// Catches a schedule that breaks a promise: the budget, the memory limit, the order of arrival,
// progress for everyone. Requests of all sizes come and go at random, and each step is checked
// against the state before it.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { layerMajor, pagesFor } from '../kv/layout.ts'
import { type KvMover, RegionTable } from '../kv/regions.ts'
import { SlotTable } from '../kv/slots.ts'
import { isDecoding, Scheduler, type Sharing, stepTokensNeeded } from './scheduler.ts'

const LAYOUT = layerMajor({ layers: 2, rowBytes: 64, maxTokens: 64, pageBytes: 256 })

const ALONE: Sharing<Item> = { prefixOf: () => [], evict: () => false }

function slotTable(
  slots: number,
  pages: number,
  discard: KvMover['discard'] = () => {},
): SlotTable {
  const mover = { map: () => {}, copy: () => {}, discard }
  return new SlotTable(new RegionTable(LAYOUT, slots, pages, mover), slots)
}

interface Item {
  id: number
  prompt: number
  readonly promptLength: number
  readonly lengthMax: number
  image: undefined
  turn: number
  preemptions: number
  output: number
  /** Steps after its arrival at which it is aborted. */
  abortAfter: number | undefined
  arriveAt: number
  length: number
  computed: number
  slot: number
}

function newItem(id: number, prompt: number, output: number): Item {
  const lengths = { length: prompt, promptLength: prompt, lengthMax: prompt + output }
  const state = { computed: 0, slot: -1, image: undefined, turn: 0, preemptions: 0 }
  return { id, prompt, output, abortAfter: undefined, arriveAt: 0, ...lengths, ...state }
}

interface Load {
  maxSequences: number
  extraBudget: number
  limitPages: number
  greedy: boolean
  items: { prompt: number; output: number; gap: number; abortAfter: number | undefined }[]
}

const loads: fc.Arbitrary<Load> = fc.record({
  maxSequences: fc.integer({ min: 1, max: 6 }),
  extraBudget: fc.nat(20),
  // The longest sequence needs 32 pages: from just that to plenty.
  limitPages: fc.integer({ min: 32, max: 100 }),
  greedy: fc.boolean(),
  items: fc.array(
    fc.record({
      prompt: fc.integer({ min: 1, max: 40 }),
      output: fc.integer({ min: 1, max: 24 }),
      gap: fc.nat(4),
      // A fifth is aborted.
      abortAfter: fc.nat(30).chain((at) => fc.constantFrom(at, ...Array(4).fill(undefined))),
    }),
    { minLength: 1, maxLength: 16 },
  ),
})

/** Runs a load to its end, checking every step. */
class Run {
  readonly slots: SlotTable
  readonly scheduler: Scheduler<Item>
  readonly stepTokens: number
  readonly maxSequences: number
  readonly released: number[] = []
  preempted = 0
  private readonly coming: Item[]
  private readonly alive = new Set<Item>()
  private step = 0

  constructor({ maxSequences, extraBudget, limitPages, greedy, items }: Load) {
    this.maxSequences = maxSequences
    this.stepTokens = maxSequences + extraBudget
    // Without sharing, a slot's region is its own.
    this.slots = slotTable(maxSequences, limitPages, (region) => this.released.push(region))
    const options = { stepTokens: this.stepTokens, maxSequences, chunkTokensMin: 1, greedy }
    this.scheduler = new Scheduler(this.slots, options, ALONE)
    let arriveAt = 0
    this.coming = items.map(({ gap, prompt, output, abortAfter }, id) => {
      arriveAt += gap
      return { ...newItem(id, prompt, output), arriveAt, abortAfter }
    })
  }

  toTheEnd(): void {
    // Each step the oldest gets at least a token done, of its prompt or output; a preemption can
    // make it do them again only when it is not the oldest.
    const work = this.coming.reduce((sum, { prompt, output }) => sum + prompt + output, 0)
    const stepsMax = 2 * work + this.coming.at(-1)!.arriveAt
    while (this.coming.length + this.alive.size > 0) {
      this.arriveAndAbort()
      this.planAndCheck()
      this.step++
      assert.ok(this.step <= stepsMax, `not done after ${stepsMax} steps`)
    }
    assert.equal(this.slots.availablePages(), this.slots.limitPages, 'pages are left behind')
  }

  private arriveAndAbort(): void {
    while (this.coming[0] && this.coming[0].arriveAt <= this.step) {
      const item = this.coming.shift()!
      this.alive.add(item)
      this.scheduler.waiting.push(item)
    }
    for (const item of this.alive) {
      if (item.abortAfter !== undefined && item.arriveAt + item.abortAfter === this.step) {
        this.end(item, -Infinity)
      }
    }
  }

  private end(item: Item, sinceMs: number): void {
    this.scheduler.remove(item, sinceMs)
    this.alive.delete(item)
    assert.equal(item.slot, -1)
  }

  private planAndCheck(): void {
    const before = this.scheduler.running.map((item) => ({
      item,
      pages: this.slots.pagesOf(item.slot),
      growth: isDecoding(item) ? pagesFor(LAYOUT, item.length) - this.slots.pagesOf(item.slot) : 0,
    }))
    const available = this.slots.availablePages()
    this.released.length = 0
    const parts = this.scheduler.plan()
    this.slots.check()

    const gone = before.filter(({ item }) => !this.scheduler.running.includes(item))
    this.preempted += gone.length
    this.checkPreemption(before, gone, available)
    this.checkOrder()
    this.checkMemory()

    const used = parts.reduce((sum, { count }) => sum + count, 0)
    assert.ok(used <= this.stepTokens, 'the budget is exceeded')
    assert.equal(new Set(parts.map(({ sequence }) => sequence)).size, parts.length)
    for (const { sequence, count } of parts) {
      assert.ok(count >= 1 && sequence.computed + count <= sequence.length)
      // What was decoded once is decoded again.
      if (sequence.computed + count > sequence.prompt) assert.equal(count, 1)
      const pages = pagesFor(LAYOUT, sequence.computed + count)
      assert.ok(pages <= this.slots.pagesOf(sequence.slot), 'a token has no page')
    }

    const { running } = this.scheduler
    const decoding = running.filter(isDecoding).toSorted((a, b) => a.slot - b.slot)
    const ordered = parts.map(({ sequence }) => sequence)
    assert.deepEqual(ordered.slice(0, decoding.length), decoding, 'not all decodes come first')
    const filling = running.filter((item) => !isDecoding(item))
    const chunks = parts.slice(decoding.length)
    assert.deepEqual(
      chunks.map(({ sequence }) => sequence),
      filling.slice(0, chunks.length),
      'prompts are not filled in order of arrival',
    )
    if (filling.some(({ prompt, computed }, i) => prompt - computed !== chunks[i]?.count)) {
      assert.equal(used, this.stepTokens, 'a prompt waits while budget is left')
      chunks.slice(0, -1).forEach(({ sequence, count }) => {
        assert.equal(sequence.computed + count, sequence.prompt, 'a later prompt was preferred')
      })
    }
    if (this.alive.size > 0) {
      const oldest = [...this.alive].reduce((a, b) => (a.id < b.id ? a : b))
      assert.ok(ordered.includes(oldest), 'the oldest sequence does not progress')
    }
    for (const { sequence, count } of [...parts]) this.commit(sequence, count)
  }

  private commit(item: Item, count: number): void {
    item.computed += count
    if (item.computed < item.length) return
    item.length++
    if (item.length === item.prompt + item.output) this.end(item, this.step)
  }

  /** Who had to go were the last, and without the last of them it would not have been enough. */
  private checkPreemption(
    before: readonly { item: Item; pages: number; growth: number }[],
    gone: typeof before,
    available: number,
  ): void {
    assert.deepEqual(gone, before.slice(before.length - gone.length), 'not the last gave way')
    const first = gone[0]
    if (!first) return
    const later = gone.slice(1).reduce((sum, { pages }) => sum + pages, 0)
    const upTo = before.slice(0, before.length - gone.length + 1)
    const needed = upTo.reduce((sum, { growth }) => sum + Math.max(0, growth), 0)
    assert.ok(needed > available + later, 'a sequence was preempted without need')
    assert.equal(first.item.computed, 0)
  }

  private checkOrder(): void {
    const { running, waiting } = this.scheduler
    const ids = [...running, ...waiting].map(({ id }) => id)
    assert.deepEqual(
      ids,
      ids.toSorted((a, b) => a - b),
      'someone jumped the queue',
    )
    assert.equal(ids.length, this.alive.size, 'someone got lost')
    assert.ok(waiting.every(({ slot, computed }) => slot === -1 && computed === 0))
    assert.ok(running.length <= this.maxSequences)
  }

  private checkMemory(): void {
    const slots = this.scheduler.running.map(({ slot }) => slot)
    assert.equal(new Set(slots).size, slots.length, 'a slot has two owners')
    assert.ok(this.slots.usedPages <= this.slots.limitPages)
    // Nobody who has tokens in memory may have had that memory taken away.
    for (const { slot, computed } of this.scheduler.running) {
      assert.ok(computed === 0 || !this.released.includes(slot), 'pages were pulled away')
    }
  }
}

test('a step breaks the budget, the limit, the order, or leaves someone behind', () => {
  let preempted = 0
  fc.assert(
    fc.property(loads, (load) => {
      const run = new Run(load)
      run.toTheEnd()
      preempted += run.preempted
    }),
    { seed: 23, numRuns: 4000 },
  )
  assert.ok(preempted > 500, `only ${preempted} preemptions were seen`)
})

test('memory for one sequence alone stops the others for good', () => {
  const items = Array.from({ length: 12 }, () => ({
    prompt: 40,
    output: 24,
    gap: 0,
    abortAfter: undefined,
  }))
  new Run({ maxSequences: 6, extraBudget: 0, limitPages: 32, greedy: true, items }).toTheEnd()
})

test('a step too small for every sequence to decode is taken', () => {
  const slots = slotTable(4, 100)
  assert.throws(
    () => new Scheduler(slots, { stepTokens: 3, maxSequences: 4, chunkTokensMin: 1 }, ALONE),
    /decode/,
  )
})

test('a prompt is let in whose first output throws it out again', () => {
  // 4 tokens a page and two layers: a prompt of 4 has 2 pages, its first output needs 2 more.
  const slots = slotTable(2, 6)
  const scheduler = new Scheduler<Item>(
    slots,
    { stepTokens: 16, maxSequences: 2, chunkTokensMin: 1 },
    ALONE,
  )
  const [first, second] = [0, 1].map((id) => newItem(id, 4, 4)) as [Item, Item]
  scheduler.waiting.push(first, second)
  assert.deepEqual(scheduler.plan(), [{ sequence: first, count: 4 }])
  assert.deepEqual(scheduler.waiting, [second])
})

test('who makes room with its last token on the way is let in for one more', () => {
  // 16 pages of 4 tokens each in two layers, for 64 tokens; the first one's third page is full.
  const slots = slotTable(2, 2 * 19)
  const [first, last] = [newItem(0, 11, 20), newItem(1, 63, 1)]
  let cached = false
  const prefixOf = ({ id }: Item) => (cached && id === 1 ? slots.spansOf(first.slot, 8) : [])
  const scheduler = new Scheduler<Item>(
    slots,
    { stepTokens: 100, maxSequences: 2, chunkTokensMin: 1, greedy: true },
    { prefixOf, evict: () => false },
  )
  // As steps that are queued ahead do: a token follows whose value is not known yet.
  const step = () =>
    scheduler.plan().map(({ sequence, count }) => {
      sequence.computed += count
      if (sequence.computed === sequence.length) sequence.length++
      return sequence.id
    })
  scheduler.waiting.push(first)
  assert.deepEqual(step(), [0])
  scheduler.waiting.push(last)
  assert.deepEqual(step(), [0, 1])
  cached = true
  assert.deepEqual(step(), [0])
  assert.deepEqual(scheduler.waiting, [last])
  scheduler.remove(last, 0)
  assert.deepEqual(step(), [0])
})

test('who came first waits behind who came later and gave way later', () => {
  const options = { stepTokens: 64, maxSequences: 3, chunkTokensMin: 1 }
  const scheduler = new Scheduler<Item>(slotTable(3, 100), options, ALONE)
  const [first, second, third, never] = [0, 1, 2, 3].map((id) => newItem(id, 4, 4))
  const order = () => scheduler.waiting.map(({ id }) => id)
  scheduler.waiting.push(first!, second!, third!, never!)
  scheduler.plan()
  assert.deepEqual(order(), [3])
  for (const sequence of [first!, third!, second!]) scheduler.giveWay(sequence)
  assert.deepEqual(order(), [0, 1, 2, 3])
  scheduler.plan()
  for (const sequence of [third!, second!, first!]) scheduler.giveWay(sequence)
  assert.deepEqual(order(), [0, 1, 2, 3])
})

test('who waits for the prompt of another one holds up others, or loses a place to them', () => {
  const slots = slotTable(4, 100)
  const items = [0, 1, 2, 3, 4].map((id) => newItem(id, 4, 4))
  let waits = [1, 2]
  const scheduler = new Scheduler<Item>(
    slots,
    { stepTokens: 64, maxSequences: 4, chunkTokensMin: 1 },
    { prefixOf: ({ id }) => (waits.includes(id) ? 'wait' : []), evict: () => false },
  )
  scheduler.waiting.push(...items)
  const planned = () => scheduler.plan().map(({ sequence }) => sequence.id)
  assert.deepEqual(planned(), [0, 3])
  assert.deepEqual(
    scheduler.waiting.map(({ id }) => id),
    [1, 2, 4],
  )
  waits = []
  assert.deepEqual(planned(), [0, 3, 1, 2])
})

test('a prompt is cut into a chunk that another kernel would compute, or waits for ever', () => {
  const chunkTokensMin = 4
  fc.assert(
    fc.property(
      fc.array(fc.integer({ min: 1, max: 40 }), { minLength: 1, maxLength: 6 }),
      fc.integer({ min: 0, max: 9 }),
      (prompts, extra) => {
        const maxSequences = 3
        const slots = slotTable(maxSequences, 1 << 20)
        const stepTokens = stepTokensNeeded(maxSequences, chunkTokensMin) + extra
        const options = { stepTokens, maxSequences, chunkTokensMin }
        const scheduler = new Scheduler<Item>(slots, options, ALONE)
        const items = prompts.map((prompt, id) => newItem(id, prompt, 5))
        scheduler.waiting.push(...items)
        for (let step = 0; scheduler.waiting.length + scheduler.running.length > 0; step++) {
          assert.ok(step < 500, 'a prompt never advances')
          for (const { sequence, count } of scheduler.plan().map((part) => ({ ...part }))) {
            const whole = sequence.computed === 0 && count === sequence.prompt
            const decode = sequence.computed >= sequence.prompt
            assert.ok(decode || whole || count >= chunkTokensMin, `a chunk of ${count}`)
            sequence.computed += count
            if (sequence.computed < sequence.length) continue
            sequence.length++
            if (sequence.length === sequence.prompt + sequence.output) scheduler.remove(sequence, 0)
          }
        }
      },
    ),
    { seed: 5, numRuns: 300 },
  )
})
