// Catches KV memory that the kernel does not see as it should: pages that come too early, stay too
// long, exceed the limit or are wasted. The kernel is real; rows are written without computing.

import assert from 'node:assert/strict'
import { fstatSync, readFileSync } from 'node:fs'
import { test } from 'node:test'
import { Bench, sequenceRequest } from '../../../test/support/null-engine.ts'
import { Random } from '../../../test/support/random.ts'
import { WritingBackend } from '../../../test/support/writing-backend.ts'
import { liveBytes, pagesFor } from '../../kv/layout.ts'
import { HOST_PAGE_BYTES } from './kv-memory.ts'

/** SmolLM2-135M's. */
const SMOL = { layers: 30, rowBytes: 768 }

/** Resident bytes of the mapping, as smaps tells any outsider. */
function smapsBytes(): number {
  const smaps = readFileSync('/proc/self/smaps', 'utf8')
  const at = smaps.indexOf('memfd:lattice-kv')
  return Number(/^Rss:\s+(\d+) kB$/m.exec(smaps.slice(at))?.[1]) * 1024
}

test('pages appear before a token is written, or stay after release', () => {
  const sizes = { ...SMOL, contextLength: 2048, maxSequences: 3, stepTokens: 16 }
  const backend = new WritingBackend(sizes)
  const { kv } = backend
  const resident = () => {
    const bytes = fstatSync(kv.fd).blocks * 512
    assert.equal(kv.residentBytes(), bytes)
    assert.equal(smapsBytes(), bytes)
    return bytes
  }
  assert.equal(resident(), 0)
  const lengths = [0, 0, 0]
  const write = (slot: number, count: number) => {
    backend.write(slot, lengths[slot]!, count)
    lengths[slot]! += count
    const pages = lengths.reduce((sum, length) => sum + pagesFor(kv.layout, length), 0)
    assert.equal(resident(), pages * HOST_PAGE_BYTES)
  }
  for (const count of [1, 4, 1, 10, 100]) {
    write(0, count)
    write(2, count)
  }
  kv.release(2)
  assert.equal(resident(), pagesFor(kv.layout, 116) * HOST_PAGE_BYTES)
  assert.ok(backend.holds(0, 0) && backend.holds(0, 115), 'a neighbour was released')
  assert.ok(backend.holds(2, 0, -1), 'released memory is not zero')
  kv.release(2)
  kv.release(0)
  // Reading what holds() read above made the kernel give a zeroed page; now all are gone.
  assert.equal(resident(), 0)
  backend.close()
})

test('64 sequences exceed 512M of memory, or do not come to an end below it', () => {
  const limit = 512 << 20
  const sizes = { ...SMOL, contextLength: 2048, maxSequences: 64, stepTokens: 2048 }
  const backend = new WritingBackend(sizes)
  const kvPages = Math.floor(limit / HOST_PAGE_BYTES)
  const engine = new Bench(backend, { maxSequences: 64, kvPages, greedy: true })
  const random = new Random(7)
  for (let id = 0; id < 64; id++) {
    const prompt = new Int32Array(50 + random.below(800))
    engine.submit(id, sequenceRequest({ prompt, maxTokens: 1 + random.below(120) }))
  }
  let most = 0
  while (engine.step()) most = Math.max(most, backend.kv.residentBytes())
  assert.ok(most <= limit, `${most} bytes were resident`)
  assert.ok(most > 0.95 * limit, `only ${most} bytes were used`)
  const { finished, preemptions } = engine.core.snapshot()
  assert.equal(finished.length, 64)
  assert.ok(preemptions > 0, 'the limit was never felt')
  engine.settle()
  assert.equal(backend.kv.residentBytes(), 0)
  backend.close()
})

test('more than 2 % is wasted at 32 sequences of 50 to 2,000 tokens', () => {
  const sizes = { ...SMOL, contextLength: 4096, maxSequences: 32, stepTokens: 512 }
  const backend = new WritingBackend(sizes)
  const engine = new Bench(backend, { maxSequences: 32, kvPages: 1e7 })
  const random = new Random(3)
  for (let id = 0; id < 32; id++) {
    const prompt = new Int32Array(50 + random.below(1951 - 40))
    engine.submit(id, sequenceRequest({ prompt, maxTokens: 1000 }))
  }
  const decoding = () => engine.core.snapshot().sequences.filter(({ state }) => state === 'decode')
  while (decoding().length < 32) engine.step()
  const { sequences } = engine.core.snapshot()
  const { layout } = backend.kv
  const live = sequences.reduce((sum, { kvTokens }) => sum + liveBytes(layout, kvTokens), 0)
  const waste = backend.kv.residentBytes() / live - 1
  assert.ok(waste >= 0 && waste <= 0.02, `${(waste * 100).toFixed(2)} %`)
  backend.close()
})
