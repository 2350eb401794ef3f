// Catches a prompt from another thread that the engine answers otherwise than one of the client's
// own, counts wrongly, or leaves without an end. The engine's thread is real, its compute null.

import assert from 'node:assert/strict'
import { test, type TestContext } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { sequenceRequest, VOCAB } from '../../test/support/null-engine.ts'
import type { FinishReason } from './api.ts'
import { EngineClient } from './client.ts'
import { DirectQueue } from './handover.ts'

const CONTEXT = 80
const KV = { layers: 2, rowBytes: 64, pageBytes: 256 }
const SEQUENCES = 6

async function start(t: TestContext, backend: { stepMs?: number; fault?: never } = {}) {
  const engine = await EngineClient.start(
    {
      backend: { kind: 'null', vocab: VOCAB, kv: KV, ...backend },
      contextLength: CONTEXT,
      maxSequences: 2,
      stepTokens: 16,
      kvBytes: 1 << 20,
    },
    { id: 'null', architecture: 'none', contextLength: CONTEXT, vocabSize: VOCAB },
    { sequences: SEQUENCES, contextLength: CONTEXT },
  )
  t.after(() => engine.close())
  const tokens = new Map<number, number[]>()
  const started = new Map<number, number>()
  const ends = new Map<number, [reason: FinishReason, outputTokens: number]>()
  let stopped: string | undefined
  const way = engine.direct(
    {
      onStart: (id, cached) => void started.set(id, cached),
      onToken: (id, token) => void tokens.set(id, [...(tokens.get(id) ?? []), token]),
      onFinish: (id, reason, outputTokens) => void ends.set(id, [reason, outputTokens]),
      onStopped: (error) => (stopped = error.code),
    },
    [],
  )
  const queue = new DirectQueue(way.place)
  const submit = (maxTokens = 8): number | undefined => {
    const { requestId, tenant, prompt } = sequenceRequest()
    const how = { temperature: 0.8, topP: 0.9, seed: 5 }
    const id = queue.submit({ requestId, tenant, prompt, maxTokens, ...how })
    queue.tell()
    return id
  }
  const until = async (condition: () => boolean): Promise<void> => {
    while (!condition()) await sleep(1)
  }
  return { engine, way, tokens, started, ends, submit, until, stopped: () => stopped }
}

function own(engine: EngineClient, maxTokens = 8): Promise<number[]> {
  const sampling = { ...sequenceRequest().sampling, temperature: 0.8, topP: 0.9, seed: 5 }
  return new Promise((resolve) => {
    const tokens: number[] = []
    engine.submit(sequenceRequest({ sampling, maxTokens }), {
      onToken: (token) => tokens.push(token),
      onFinish: () => resolve(tokens),
    })
  })
}

test('a prompt from another thread gets another answer', async (t) => {
  const { engine, way, tokens, started, ends, submit, until } = await start(t)
  const expected = await own(engine)
  const ids = [submit(), submit(), submit()] as number[]
  assert.equal(new Set(ids).size, 3)
  const [again] = await Promise.all([own(engine), until(() => ends.size === 3)])
  assert.deepEqual(again, expected)
  for (const id of ids) {
    assert.deepEqual(tokens.get(id), expected)
    assert.deepEqual(ends.get(id), ['length', 8])
    assert.equal(started.get(id), 0)
  }
  assert.equal(way.running(), 0)
  assert.equal(engine.queueRoom(), SEQUENCES)
})

test('places are counted by one side only, or an abort comes too early to be heard', async (t) => {
  const { engine, way, ends, submit, until } = await start(t, { stepMs: 5 })
  const mine = own(engine, 70)
  const ids = Array.from({ length: SEQUENCES - 1 }, () => submit(70)) as number[]
  assert.equal(submit(), undefined)
  assert.equal(engine.queueRoom(), 0)
  assert.equal(way.running(), SEQUENCES - 1)
  assert.throws(() => void engine.submit(sequenceRequest(), { onToken() {}, onFinish() {} }), {
    code: 'queue_full',
  })
  const { sequences } = await engine.snapshot()
  assert.ok(sequences.some(({ id }) => id === ids[0]))
  for (const id of ids) way.abort(id)
  await until(() => ends.size === ids.length)
  for (const [reason] of ends.values()) assert.equal(reason, 'abort')
  assert.equal((await mine).length, 70)
  const late = submit(70)!
  way.abort(late)
  await until(() => ends.has(late))
  assert.equal(engine.queueRoom(), SEQUENCES)
})

test('what runs when the way is closed runs on, or a drain does not wait for it', async (t) => {
  const { engine, way, ends, submit, until } = await start(t, { stepMs: 2 })
  const id = submit(30)!
  await engine.drain()
  assert.deepEqual(ends.get(id), ['length', 30])
  assert.equal(submit(), undefined, 'a drained engine takes another one')
  assert.equal(engine.queueRoom(), SEQUENCES)
  const next = await start(t, { stepMs: 5 })
  next.submit(70)
  next.way.close()
  next.way.close()
  await until(() => next.engine.queueRoom() === SEQUENCES)
  assert.equal(next.ends.size, 0)
  assert.equal(way.running(), 0)
})

test('an engine that ends leaves them without a word', async (t) => {
  const { engine, submit, stopped } = await start(t, { stepMs: 5 })
  submit(70)
  await engine.close()
  assert.equal(stopped(), 'engine_stopped')
  assert.equal(submit(), undefined)
})
