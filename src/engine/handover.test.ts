// Catches a prompt that is damaged, lost, counted twice or let in too many on the short way into
// the engine's queue.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { SequenceRequest } from './api.ts'
import { COUNTS, DirectPrompts, DirectQueue, handoverMemory } from './handover.ts'

function both(limits: { sequences?: number; tokensMax?: number; words?: number } = {}) {
  const counts = new Int32Array(new SharedArrayBuffer(4 * COUNTS.words))
  const place = {
    memory: handoverMemory(limits.words),
    counts: counts.buffer,
    signal: new SharedArrayBuffer(4),
    sequences: limits.sequences ?? 1000,
    tokensMax: limits.tokensMax ?? 1 << 20,
    stopTokens: [7, 9],
  }
  return { queue: new DirectQueue(place), prompts: new DirectPrompts(place), counts, place }
}

function request(tokens: number, first = 0) {
  return {
    requestId: '0123456789abcdef',
    tenant: 'ünd 日本 🙂',
    prompt: Int32Array.from({ length: tokens }, (_, i) => first + i),
    temperature: 0.7,
    topP: 0.95,
    seed: 2 ** 52 - 1,
    maxTokens: 5,
  }
}

test('what is read is not what was written', () => {
  const { queue, prompts } = both()
  const id = queue.submit(request(1000, 50))
  const taken: [number, SequenceRequest][] = []
  prompts.take((...one) => taken.push(one))
  const { temperature, topP, seed, ...rest } = request(1000, 50)
  assert.equal(taken.length, 1)
  const [[takenId, { sampling, ...asked }]] = taken as [[number, SequenceRequest]]
  assert.equal(takenId, id)
  assert.deepEqual(asked, { ...rest, stopTokens: [7, 9], topLogprobs: undefined })
  assert.deepEqual(
    [sampling.temperature, sampling.topP, sampling.seed, sampling.topK],
    [temperature, topP, seed, 0],
  )
  assert.ok(prompts.live.has(takenId))
  prompts.finished(takenId)
  assert.equal(prompts.live.size, 0)
})

test('prompts are lost or mixed up where the memory begins anew', () => {
  const { queue, prompts, counts } = both({ sequences: 1e9, words: 4096 })
  const written: (readonly [id: number, tokens: number])[] = []
  let read = 0
  let full = 0
  // So that its end comes at every distance.
  for (let i = 0; i < 4000; i++) {
    const tokens = 1 + ((i * 7919) % 701)
    const live = counts[COUNTS.live]!
    const id = queue.submit(request(tokens, i))
    if (id === undefined) {
      full++
      assert.equal(counts[COUNTS.live], live, 'what is refused keeps its place')
    } else written.push([id, tokens])
    if (id !== undefined && i % 3 > 0) continue
    prompts.take((taken, { prompt, maxTokens }) => {
      const [expected, length] = written[read++]!
      assert.equal(taken, expected)
      assert.equal(prompt.length, length)
      assert.equal(prompt.at(-1)! - prompt[0]!, length - 1)
      assert.equal(maxTokens, 5)
    })
    assert.equal(read, written.length)
  }
  for (let i = 0; queue.submit(request(400)) !== undefined; i++) assert.ok(i < 20, 'never full')
  prompts.take(() => read++)
  assert.ok(queue.submit(request(400)), 'it stays full')
  assert.ok(full < 1000)
})

test('a prompt that is taken later lies where an earlier one still does', () => {
  const { queue, prompts } = both()
  const taken: SequenceRequest[] = []
  const lengths = Array.from({ length: 200 }, (_, i) => 1 + ((i * 7919) % 3001))
  lengths.forEach((tokens, i) => {
    assert.notEqual(queue.submit(request(tokens, i * 10_000)), undefined)
    prompts.take((_id, one) => taken.push(one))
  })
  lengths.forEach((tokens, i) => {
    assert.deepEqual(taken[i]?.prompt, request(tokens, i * 10_000).prompt)
  })
})

test('more is let in than limits say, or the place of a refused one is kept', () => {
  const { queue, counts } = both({ sequences: 2, tokensMax: 20 })
  assert.equal(queue.submit(request(0)), undefined)
  assert.equal(queue.submit(request(16)), undefined)
  assert.equal(queue.submit({ ...request(3), maxTokens: 0 }), undefined)
  assert.equal(counts[COUNTS.live], 0)
  assert.notEqual(queue.submit(request(15)), undefined)
  assert.notEqual(queue.submit(request(1)), undefined)
  assert.equal(queue.submit(request(1)), undefined)
  assert.equal(counts[COUNTS.live], 2)
  counts[COUNTS.live] = 0
  counts[COUNTS.closed] = 1
  assert.equal(queue.submit(request(1)), undefined)
  assert.equal(counts[COUNTS.live], 0)
})

test('the engine is woken for nothing, or sleeps on', () => {
  const { queue, place } = both()
  const signal = new Int32Array(place.signal)
  queue.tell()
  assert.equal(signal[0], 0)
  queue.submit(request(1))
  queue.submit(request(1))
  queue.tell()
  queue.tell()
  assert.equal(signal[0], 1)
})
