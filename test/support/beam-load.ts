// Owns random loads of beam searches beside other requests, some of which leave early, and what
// must come out of them on any memory.

import assert from 'node:assert/strict'
import fc from 'fast-check'
import { GREEDY, type EngineSnapshot, type SequenceRequest } from '../../src/engine/api.ts'
import {
  type Bench,
  type BenchEvent,
  expectedBeams,
  expectedOutcome,
  sequenceRequest,
  VOCAB,
} from './null-engine.ts'

const beamParams = fc.record({
  width: fc.integer({ min: 2, max: 5 }),
  lengthPenalty: fc.constantFrom(0, 0.5, 1, 2, -1),
  earlyStopping: fc.constantFrom(true, false, 'never' as const),
})
const prompts = fc.array(fc.nat(VOCAB - 1), { minLength: 1, maxLength: 20 })

/** At least 5 sequences must run at once, and 80 tokens fit into one. */
export const beamArrivals = fc.array(
  fc.record({
    prompt: prompts,
    beams: fc
      .constantFrom(undefined, 0, 0)
      .chain((no) => (no === undefined ? fc.constant(no) : beamParams)),
    maxTokens: fc.integer({ min: 1, max: 25 }),
    /** Who is no beam search goes on for longer. */
    more: fc.nat(35),
    stopTokens: fc.constantFrom([], [7], [7, 11, 30]),
    gap: fc.nat(4),
    abortAfter: fc.nat(30).chain((at) => fc.constantFrom(at, ...Array(4).fill(undefined))),
  }),
  { minLength: 3, maxLength: 8 },
)

type Arrivals = typeof beamArrivals extends fc.Arbitrary<infer T> ? T : never

/**
 * Columns that the largest of them takes, on its own.
 * @param bytes of a token in a column's range; pages are shared in groups of `group`
 */
export function columnsNeeded(
  arrivals: Arrivals,
  { bytes, pageBytes, group = 1 }: { bytes: number; pageBytes: number; group?: number },
): number {
  const needs = arrivals.map(({ prompt, maxTokens, more, beams }) => {
    const pages = ((prompt.length + maxTokens + (beams ? 0 : more)) * bytes) / pageBytes
    if (!beams) return Math.ceil(pages)
    const full = Math.floor((prompt.length * bytes) / pageBytes)
    const shared = full - (full % group)
    return shared + beams.width * (Math.ceil(pages) - shared)
  })
  return Math.max(...needs)
}

/** What the loads made happen, in sum: a test of nothing would pass, too. */
export interface BeamsSeen {
  searches: number
  preemptions: number
  compactions: number
}

/** Serves a load to its end. @param check sees the memory after each step */
export function runBeamLoad(
  engine: Bench,
  arrivals: Arrivals,
  seen: BeamsSeen,
  check: (kv: EngineSnapshot['kv']) => void,
): void {
  const events: BenchEvent[] = []
  const asked: { request: SequenceRequest; ids: number[] }[] = []
  let at = 0
  let id = 0
  for (const { beams, gap, abortAfter, prompt, more, ...rest } of arrivals) {
    at += gap
    const request = sequenceRequest({ ...rest, prompt: Int32Array.from(prompt) })
    if (beams) request.beams = beams
    else request.maxTokens += more
    const ids = Array.from({ length: beams ? beams.width - 1 : 1 }, () => id++)
    asked.push({ request, ids })
    const samplings = ids.map(() => GREEDY)
    events.push({ at, act: () => engine.submitChoices(ids, request, samplings) })
    if (abortAfter === undefined) continue
    const abort = (): void => ids.forEach((one) => engine.core.abort(one))
    events.push({ at: at + abortAfter, act: abort })
  }
  engine.play(events, check)
  const { preemptions, beamCopies } = engine.core.snapshot()
  seen.preemptions += preemptions
  seen.compactions += beamCopies
  for (const { request, ids } of asked) {
    if (engine.outcome(ids[0]!).reason === 'abort') continue
    if (request.beams) {
      seen.searches++
      assertBeams(engine, request, ids)
      continue
    }
    const { tokens, reason, outputTokens } = engine.outcome(ids[0]!)
    assert.deepEqual({ tokens, reason, outputTokens }, expectedOutcome(request))
  }
}

/** The hypotheses of a search are those that a plain one finds. */
export function assertBeams(engine: Bench, request: SequenceRequest, ids: readonly number[]): void {
  const expected = expectedBeams(request)
  ids.forEach((id, i) => {
    const { tokens, stopped, score } = expected[i]!
    const found = engine.outcome(id)
    assert.deepEqual(found.tokens, stopped ? tokens.slice(0, -1) : tokens)
    assert.equal(found.outputTokens, tokens.length)
    assert.equal(found.reason, stopped ? 'stop' : 'length')
    assert.ok(Math.abs(found.score! - score) < 1e-5, `${found.score} for ${score}`)
    assert.equal(found.started, 1)
  })
}
