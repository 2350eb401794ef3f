// Owns random loads of requests that share prompts, abort and run out of memory, and what must be
// true while and after any backend serves them.

import assert from 'node:assert/strict'
import fc from 'fast-check'
import type { ErrorCode } from '../../src/errors.ts'
import { GREEDY, type EngineSnapshot, type SequenceRequest } from '../../src/engine/api.ts'
import { type Bench, type BenchEvent, expectedOutcome, sequenceRequest } from './null-engine.ts'

/** Prompts of a few words, so that they begin alike. */
export const prompts = fc
  .array(fc.constantFrom([1, 2, 3, 4, 5], [1, 2, 9], [6], [7, 8, 7, 8, 7, 8, 7]), {
    minLength: 1,
    maxLength: 6,
  })
  .map((words) => Int32Array.from(words.flat()))

function loadsWith(pinned: fc.Arbitrary<boolean>) {
  return fc.record({
    maxSequences: fc.integer({ min: 2, max: 6 }),
    extraBudget: fc.nat(30),
    // One sequence of 80 tokens needs 50 pages.
    kvPages: fc.integer({ min: 50, max: 110 }),
    prefixPages: fc.constantFrom(0, 12, 50, 50),
    arrivals: fc.array(
      fc.record({
        prompt: prompts,
        choices: fc.constantFrom(1, 1, 2, 5),
        tenant: fc.constantFrom('a', 'a', 'b'),
        maxTokens: fc.oneof(fc.integer({ min: 1, max: 3 }), fc.integer({ min: 10, max: 36 })),
        temperature: fc.constantFrom(0, 1),
        stopTokens: fc.constantFrom([], [], [7, 21, 33]),
        seed: fc.nat(1000),
        gap: fc.nat(4),
        pinned,
        // A fifth of the choices is aborted.
        abortAfter: fc.nat(40).chain((at) => fc.constantFrom(at, ...Array(4).fill(undefined))),
      }),
      { minLength: 3, maxLength: 9 },
    ),
  })
}

export const loads = loadsWith(fc.constant(false))
/** Some prompts are pinned, or cannot be. */
export const pinningLoads = loadsWith(fc.constantFrom(true, false, false, false))

type Load = typeof loads extends fc.Arbitrary<infer T> ? T : never

/** What the loads made happen, in sum: a test of nothing would pass, too. */
export interface Seen {
  hits: number
  preemptions: number
  saved: number
}

/**
 * Serves a load to its end. `check` sees the memory after each step.
 * @param mayEndWith an error that a sequence may end with, and be short for
 */
export function runLoad(
  engine: Bench,
  { arrivals, ...options }: Load,
  seen: Seen,
  check: (kv: EngineSnapshot['kv']) => void,
  mayEndWith?: ErrorCode,
): void {
  const requests: SequenceRequest[] = []
  const events: BenchEvent[] = []
  let at = 0
  arrivals.forEach(({ choices, gap, abortAfter, temperature, seed, pinned, ...arrival }) => {
    at += gap
    const pin = pinned ? { pin: arrival.prompt.join() } : {}
    const request = sequenceRequest({ ...arrival, ...pin })
    const first = requests.length
    const ids = Array.from({ length: choices }, (_, choice) => first + choice)
    const samplings = ids.map((_, i) => ({ ...GREEDY, temperature, seed: seed + i }))
    for (const sampling of samplings) requests.push({ ...request, sampling })
    events.push({ at, act: () => engine.submitChoices(ids, request, samplings) })
    if (abortAfter === undefined) return
    for (const id of ids.filter((_, i) => i !== 1)) {
      events.push({ at: at + abortAfter, act: () => engine.core.abort(id) })
    }
  })
  engine.play(events, (kv) => {
    assert.ok(kv.usedPages <= options.kvPages, 'the limit is exceeded')
    check(kv)
  })
  engine.settle()
  const { kv, prefixHits, preemptions, promptTokens } = engine.core.snapshot()
  seen.hits += prefixHits
  seen.preemptions += preemptions
  const all = requests.reduce((sum, { prompt }) => sum + prompt.length, 0)
  if (promptTokens < all) seen.saved++
  assert.ok(kv.usedPages <= options.prefixPages, 'pages are left behind')
  requests.forEach((request, id) => {
    const { tokens, reason, outputTokens, error } = engine.outcome(id)
    const expected = expectedOutcome(request)
    if (error && error.code !== mayEndWith) {
      assert.ok(request.pin !== undefined && error.code === 'prefix_memory_exhausted')
    } else if (reason === 'abort' || error) {
      assert.deepEqual(tokens, expected.tokens.slice(0, tokens.length))
    } else assert.deepEqual({ tokens, reason, outputTokens }, expected)
  })
}
