// Catches an engine that dies, hangs or says something else when another process takes GPU memory
// that was free, or that does not take it back when it is free again.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { NullBackend } from '../../src/backends/null/backend.ts'
import { NullTier } from '../../src/backends/null/tier.ts'
import { GREEDY } from '../../src/engine/api.ts'
import { ContendedColumns } from '../sim/contended.ts'
import { SimMemory } from '../sim/memory.ts'
import { assertBeams } from '../support/beam-load.ts'
import { HashingBackend, mockGpu } from '../support/hashing-backend.ts'
import { MockCuda } from '../support/mock-cuda.ts'
import { Bench, expectedOutcome, sequenceRequest, VOCAB } from '../support/null-engine.ts'
import { endUnlimited } from '../support/reloads.ts'
import { loads, runLoad } from '../support/sharing-load.ts'

/** 1.6 tokens a page: 80 tokens need 50 pages. */
const KV = { layers: 2, rowBytes: 80, pageBytes: 256 }
/** What the engine leaves to the driver, and a little. */
const LEFT_FREE_BYTES = (64 << 20) + 4096

/** A GPU on which somebody else takes and gives back memory, step by step. */
class Contended {
  readonly cuda: MockCuda
  private readonly allBytes: number
  private taken = 0
  took = 0

  constructor(pages: number) {
    this.allBytes = pages * KV.pageBytes + LEFT_FREE_BYTES
    this.cuda = new MockCuda({ pageBytes: KV.pageBytes, totalBytes: this.allBytes })
  }

  /** All of what is free now, as far as the other one gets. */
  take(): void {
    const { cuda } = this
    this.taken = this.allBytes - cuda.residentBytes
    cuda.totalBytes = this.allBytes - this.taken
    this.took++
  }

  giveBack(): void {
    this.taken = 0
    this.cuda.totalBytes = this.allBytes
  }
}

for (const shareColumns of [1, 4]) {
  for (const chooses of [false, true]) {
    const how = `in groups of ${shareColumns}, ${chooses ? 'steps ahead' : 'step by step'}`
    test(`memory that another process takes stops the engine or changes tokens, ${how}`, () => {
      const seen = { hits: 0, preemptions: 0, saved: 0 }
      let took = 0
      let lowered = 0
      let finished = 0
      const hogs = fc.record({ period: fc.constantFrom(3, 7, 31, 57), late: fc.boolean() })
      fc.assert(
        fc.property(loads, hogs, (load, { period, late }) => {
          const kvPages = load.kvPages + 2 * shareColumns
          const kv = { ...KV, shareColumns }
          const stepTokens = load.maxSequences + load.extraBudget
          const { maxSequences } = load
          const sizes = { vocab: VOCAB, contextLength: 80, maxSequences, stepTokens }
          const shared = new Contended(kvPages + shareColumns + 1)
          const gpu = new HashingBackend(mockGpu(shared.cuda, late), {
            ...sizes,
            kvPages,
            kv,
            chooses,
          })
          const engine = new Bench(gpu, { ...load, kvPages, greedy: true })
          let steps = 0
          const meanwhile = ({ limitPages }: { limitPages: number }): void => {
            gpu.kv.check()
            if (limitPages < kvPages) lowered++
            steps++
            engine.nowMs += 9
            if (steps % (2 * period) === period) shared.take()
            if (steps % (2 * period) === 0) shared.giveBack()
          }
          runLoad(engine, { ...load, kvPages }, seen, meanwhile, 'gpu_memory_taken')
          finished += engine.core.snapshot().finished.length
          took += shared.took
          shared.giveBack()
          endUnlimited(engine, gpu, kvPages)
          shared.cuda.assertClean()
        }),
        { seed: 23, numRuns: 25, endOnFailure: true },
      )
      assert.ok(took > 100 && lowered > 100, `taken ${took} times, short in ${lowered} steps`)
      assert.ok(finished > 200, `only ${finished} came to their end`)
    })
  }
}

test('whoever waits for memory that never comes is not told, or takes others with it', () => {
  const shared = new Contended(120)
  const sizes = { vocab: VOCAB, contextLength: 80, maxSequences: 2, stepTokens: 20 }
  const kv = { ...KV, shareColumns: 1 }
  const gpu = new HashingBackend(mockGpu(shared.cuda), {
    ...sizes,
    kvPages: 100,
    kv,
    chooses: true,
  })
  const engine = new Bench(gpu, { maxSequences: 2, kvPages: 100, greedy: true })
  shared.take()
  engine.submit(0, sequenceRequest({ prompt: new Int32Array(20).fill(3), maxTokens: 20 }))
  const beams = { width: 2, lengthPenalty: 1, earlyStopping: false as const }
  engine.submitChoices([1, 2], sequenceRequest({ maxTokens: 20, beams }), [])
  for (let i = 0; i < 9000; i++) engine.step()
  assert.equal(engine.outcome(0).reason, undefined, 'it waits for a while')
  for (let i = 0; i < 2000; i++) engine.step()
  for (const id of [0, 1, 2]) {
    assert.equal(engine.outcome(id).error?.code, 'gpu_memory_taken', `sequence ${id}`)
  }
  shared.giveBack()
  const request = sequenceRequest({ prompt: new Int32Array(20).fill(3), maxTokens: 20 })
  engine.submit(3, request)
  engine.runAll()
  assert.deepEqual(engine.outcome(3).tokens, expectedOutcome(request).tokens)
  engine.settle()
  gpu.close()
  shared.cuda.assertClean()
})

/** An engine on five or so pages of four tokens each, and who else may have some of them. */
function fewPages(kvPages: number, maxSequences: number) {
  const kv = { layers: 1, rowBytes: 64, pageBytes: 256 }
  const sizes = { vocab: VOCAB, contextLength: 20, maxSequences, stepTokens: 10, kv }
  const backend = new NullBackend(sizes)
  const { layout, slots, regions } = backend.kv
  const memory = new SimMemory(layout, slots, regions)
  memory.tier = new NullTier(memory, { capacity: 20 })
  const columns = new ContendedColumns(layout, kvPages)
  memory.contended = columns
  Object.assign(backend, { kv: memory })
  const options = { maxSequences, kvPages, greedy: true, comeBack: 'moved' } as const
  return { engine: new Bench(backend, options), columns }
}

test('what waits outside with its prompt in memory is let in where there is no room', () => {
  // Two choices of 20 tokens share two pages and lack two, so that one goes.
  const { engine, columns } = fewPages(6, 2)
  const request = sequenceRequest({ prompt: new Int32Array(8).fill(3), maxTokens: 12 })
  engine.submitChoices([0, 1], request, [GREEDY, GREEDY])
  for (let i = 0; engine.outcome(0).reason === undefined; i++) {
    engine.step()
    assert.ok(i < 100, 'the one that stays ends')
  }
  assert.equal(engine.core.snapshot().tier?.offloads, 1)
  columns.take(1)
  let refusals = 0
  for (let i = 0; i < 11_000; i++) {
    engine.step()
    engine.core.check()
    columns.take(1)
    if (i === 100) refusals = columns.refusals
  }
  assert.equal(columns.refusals, refusals, 'it asks for what is known to be taken')
  assert.equal(engine.outcome(1).error?.code, 'gpu_memory_taken')
  columns.taken = 0
  engine.submit(2, request)
  engine.runAll()
  assert.deepEqual(engine.outcome(2).tokens, expectedOutcome(request).tokens)
})

test('beams that were refused a part of what they grew by move it out as theirs', () => {
  // When the beams fork, the one beside them has two of five pages and they have two: the first
  // fork is promised the last one, which is another process's by then, and the second finds none.
  const { engine, columns } = fewPages(5, 4)
  const beside = sequenceRequest({ prompt: Int32Array.of(1, 2, 3), maxTokens: 5 })
  const beams = { width: 3, lengthPenalty: 1, earlyStopping: false as const }
  const asked = sequenceRequest({ prompt: Int32Array.of(6, 13, 4, 1, 2), maxTokens: 3, beams })
  engine.submit(0, beside)
  engine.step()
  engine.submitChoices([1, 2, 3], asked, [])
  engine.step()
  columns.taken = 1
  engine.step()
  assert.equal(columns.refusals, 1)
  assert.equal(engine.core.snapshot().tier?.offloads, 3)
  columns.taken = 0
  engine.runAll()
  assert.deepEqual(engine.outcome(0).tokens, expectedOutcome(beside).tokens)
  assertBeams(engine, asked, [1, 2, 3])
})
