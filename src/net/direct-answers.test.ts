// Catches a prompt that the ring thread queues though the main thread must see it, or whose answer
// is not what the engine said.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { fakeTokenizer, EOS } from '../../test/support/fake-tokenizer.ts'
import type { SequenceRequest } from '../engine/api.ts'
import { COUNTS, DirectPrompts, handoverMemory } from '../engine/handover.ts'
import { DIRECT_BYTES_MAX, DirectAnswers, type DirectReport } from './direct-answers.ts'
import type { WireRequest } from './exchange.ts'
import { PREFIX_LADDER } from './protocol.ts'

function parts(publishes = false, tokenizer = fakeTokenizer()) {
  const place = {
    memory: handoverMemory(),
    counts: new SharedArrayBuffer(4 * COUNTS.words),
    signal: new SharedArrayBuffer(4),
    sequences: 10,
    tokensMax: 10_000,
    stopTokens: [EOS],
  }
  new Int32Array(place.counts)[COUNTS.nextId] = 40
  const reports: DirectReport[] = []
  const names = new Map([[1, 'seven']])
  const options = { place, modelPath: '', route: 2, names, publishes }
  const answers = new DirectAnswers(options, tokenizer, (report) => reports.push(report))
  const prompts = new DirectPrompts(place)
  const taken = (): SequenceRequest[] => {
    const all: SequenceRequest[] = []
    prompts.take((_id, request) => all.push(request))
    return all
  }
  return { answers, reports, taken }
}

function wire(change: Partial<WireRequest> = {}): WireRequest {
  return {
    tenant: 1,
    request: 0xabcn,
    route: 2,
    prompt: Buffer.from('hé'),
    chat: false,
    raw: false,
    maxTokens: 9,
    sampling: { temperature: 0.5, topP: 0.9, seed: (1n << 60n) + 3n },
    ...change,
  }
}

function listener() {
  const said: unknown[] = []
  const tokens = (...all: unknown[]) => void said.push(all)
  const end = (...all: unknown[]) => void said.push(all)
  return { said, answer: { tokens, end } }
}

test('a prompt is not queued as it was sent', () => {
  const { answers, taken } = parts()
  assert.ok(answers.start(wire(), listener().answer))
  assert.ok(answers.start(wire({ raw: true, tenant: 5 }), listener().answer))
  const [first, second] = taken()
  assert.equal(first?.requestId, '0000000000000abc')
  assert.equal(first.tenant, 'seven')
  assert.equal(second?.tenant, 'default')
  assert.deepEqual([...first.prompt], [256, ...Buffer.from('hé')])
  assert.deepEqual([...second.prompt], [...Buffer.from('hé')])
  const { temperature, topP, seed } = first.sampling
  assert.deepEqual([temperature, topP, seed], [0.5, 0.9, 3])
  assert.deepEqual([first.maxTokens, first.stopTokens], [9, [EOS]])
})

test('a prompt has the tokens of another, where memory for them is used again', () => {
  const memory = new Int32Array(1 + PREFIX_LADDER[0])
  const encodeUtf8 = (utf8: Uint8Array, addSpecial: boolean): Int32Array => {
    memory.set([256, ...utf8])
    return memory.subarray(addSpecial ? 0 : 1, 1 + utf8.length)
  }
  const { answers, taken, reports } = parts(true, { ...fakeTokenizer(), encodeUtf8 })
  const long = Buffer.alloc(PREFIX_LADDER[0], 'a')
  answers.start(wire({ prompt: long }), listener().answer)
  answers.start(wire({ prompt: Buffer.from('two'), raw: true }), listener().answer)
  const prompts = taken().map(({ prompt }) => [...prompt])
  assert.deepEqual(prompts, [[256, ...long], [...Buffer.from('two')]])
  answers.hear({ kind: 'direct-token', id: 40, token: 104 })
  const [report] = reports
  assert.ok(report?.kind === 'direct-computed')
  assert.deepEqual([...report.tokens], [256, ...long])
})

test('what the main thread must see is queued here', () => {
  const { answers, taken } = parts()
  const { said, answer } = listener()
  const not: Partial<WireRequest>[] = [
    { chat: true },
    { route: 1 },
    { prompt: new Uint8Array(DIRECT_BYTES_MAX + 1).fill(97) },
    { prompt: Uint8Array.of(0xff) },
    { maxTokens: 0 },
    { maxTokens: 9_998 },
    { sampling: { temperature: NaN, topP: 1, seed: 0n } },
  ]
  for (const change of not) assert.equal(answers.start(wire(change), answer), undefined)
  for (let i = 0; i < 10; i++) assert.ok(answers.start(wire(), answer))
  assert.equal(answers.start(wire(), answer), undefined, 'the queue is full')
  assert.equal(taken().length, 10)
  assert.deepEqual(said, [])
})

test('an answer is not what the engine said', () => {
  const { answers, reports } = parts()
  const { said, answer } = listener()
  answers.start(wire(), answer)
  answers.hear({ kind: 'direct-start', id: 40, cachedTokens: 2 })
  for (const token of [104, 0xc3, 0xa9, 0xf0]) answers.hear({ kind: 'direct-token', id: 40, token })
  answers.hear({ kind: 'direct-end', id: 40, code: 'length', outputTokens: 4 })
  answers.hear({ kind: 'direct-token', id: 40, token: 104 })
  answers.hear({ kind: 'direct-end', id: 40, code: 'ok', outputTokens: 9 })
  const usage = { promptTokens: 4, cachedTokens: 2, outputTokens: 4 }
  assert.deepEqual(said, [
    [[104], 'h'],
    [[0xc3], ''],
    [[0xa9], 'é'],
    [[0xf0], ''],
    [[], '\ufffd'],
    ['length', usage],
  ])
  assert.deepEqual(reports, [])
})

test('an abort does not reach the engine, or what comes late is told', () => {
  const { answers, reports } = parts()
  const { said, answer } = listener()
  const abort = answers.start(wire(), answer)
  abort?.()
  abort?.()
  answers.hear({ kind: 'direct-token', id: 40, token: 104 })
  answers.hear({ kind: 'direct-end', id: 40, code: 'cancelled', outputTokens: 1 })
  assert.deepEqual(reports, [{ kind: 'direct-abort', id: 40 }])
  assert.deepEqual(said, [])
})

test('a failure is not in the log, or an engine that stops keeps its clients waiting', () => {
  const { answers, reports } = parts()
  const [one, two] = [listener(), listener()]
  answers.start(wire(), one.answer)
  answers.start(wire(), two.answer)
  answers.hear({ kind: 'direct-end', id: 40, code: 'failed', outputTokens: 0, why: 'broken' })
  const failed = { kind: 'direct-failed', tenant: 1, request: 0xabcn, why: 'broken' }
  assert.deepEqual(reports, [failed])
  answers.hear({ kind: 'direct-token', id: 41, token: 104 })
  answers.hear({ kind: 'direct-stop', code: 'no_replica' })
  const usage = { promptTokens: 4, cachedTokens: 0, outputTokens: 0 }
  assert.deepEqual(one.said, [['failed', usage]])
  assert.deepEqual(two.said.at(-1), ['no_replica', { ...usage, outputTokens: 1 }])
})

test('a prompt that is in memory is not told of, or twice', () => {
  const { answers, reports } = parts(true)
  const long = wire({ prompt: Buffer.from('a'.repeat(4096)) })
  answers.start(long, listener().answer)
  answers.start(wire(), listener().answer)
  for (const id of [40, 40, 41]) answers.hear({ kind: 'direct-token', id, token: 104 })
  assert.equal(reports.length, 1)
  const [report] = reports
  assert.ok(report?.kind === 'direct-computed')
  assert.equal(report.wire, long)
  assert.equal(report.tokens.length, 4097)
})
