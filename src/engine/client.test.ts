// Catches an engine thread that dies, stops or is full without everyone who waits for it being
// told, and requests that it should never have been given. The thread is real, its compute null.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Worker } from 'node:worker_threads'
import { expectedOutcome, sequenceRequest, VOCAB } from '../../test/support/null-engine.ts'
import { LatticeError } from '../errors.ts'
import { type FinishReason, GREEDY, type SequenceRequest } from './api.ts'
import { EngineClient } from './client.ts'
import type { BackendChoice } from './messages.ts'

const CONTEXT = 80
/** 4 tokens a page and two layers: a full context has 40 pages. */
const KV = { layers: 2, rowBytes: 64, pageBytes: 256 }

interface Options {
  backend?: Partial<Extract<BackendChoice, { kind: 'null' }>>
  maxSequences?: number
  queue?: number
  kvBytes?: number
}

function start({ backend, maxSequences = 4, queue = 100, kvBytes = 1 << 20 }: Options = {}) {
  return EngineClient.start(
    {
      backend: { kind: 'null', vocab: VOCAB, kv: KV, ...backend },
      contextLength: CONTEXT,
      maxSequences,
      stepTokens: 16,
      kvBytes,
    },
    { id: 'null', architecture: 'none', contextLength: CONTEXT, vocabSize: VOCAB },
    { sequences: maxSequences + queue, contextLength: CONTEXT },
  )
}

interface Answer {
  tokens: number[]
  started: number
  reason: FinishReason
  outputTokens: number
  error: LatticeError | undefined
}

/** Submits and collects; `tokens` grows while it runs. */
function ask(engine: EngineClient, change: Partial<SequenceRequest> = {}) {
  const tokens: number[] = []
  let started = 0
  const { promise, resolve } = Promise.withResolvers<Answer>()
  const handle = engine.submit(sequenceRequest(change), {
    onStart() {
      assert.equal(tokens.length, 0, 'tokens before the start')
      started++
    },
    onToken: (token) => tokens.push(token),
    onFinish: (reason, outputTokens, error) =>
      resolve({ tokens, started, reason, outputTokens, error }),
  })
  return { ...handle, tokens, answer: promise }
}

async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await sleep(1)
}

function refusal(act: () => unknown): LatticeError {
  try {
    act()
  } catch (thrown) {
    assert.ok(thrown instanceof LatticeError, String(thrown))
    return thrown
  }
  throw new Error('it was not refused')
}

/** Everything that must hold once the thread is gone, for whatever reason. */
async function checkStopped(engine: EngineClient): Promise<void> {
  assert.equal(refusal(() => ask(engine)).code, 'engine_stopped')
  await assert.rejects(engine.snapshot(), { code: 'engine_stopped' })
  await assert.rejects(engine.ask({ kind: 'map' }), { code: 'engine_stopped' })
  await engine.drain()
  await engine.close()
}

test('tokens are lost or mixed up between the threads', async () => {
  const engine = await start()
  const requests = Array.from({ length: 20 }, (_, i) =>
    sequenceRequest({
      prompt: Int32Array.from({ length: 1 + i }, (_, t) => (i * 7 + t) % VOCAB),
      maxTokens: 1 + ((i * 13) % 50),
      stopTokens: i % 3 === 0 ? [5, 6] : [],
      sampling: { ...GREEDY, temperature: i % 2, seed: i },
      topLogprobs: i % 4 === 0 ? 2 : undefined,
    }),
  )
  const answers = await Promise.all(requests.map((request) => ask(engine, request).answer))
  answers.forEach(({ tokens, reason, outputTokens, started }, i) => {
    assert.deepEqual({ tokens, reason, outputTokens }, expectedOutcome(requests[i]!))
    assert.equal(started, 1)
  })
  const { finished, outputTokens, promptTokens } = await engine.snapshot()
  assert.equal(finished.stop + finished.length, requests.length)
  assert.equal(
    outputTokens,
    answers.reduce((sum, answer) => sum + answer.outputTokens, 0),
  )
  assert.equal(promptTokens, 210)
  await engine.close()
})

test('logprobs reach another sequence than the one that asked', async () => {
  const engine = await start()
  const got: (number | undefined)[][] = [[], []]
  await Promise.all(
    got.map((list, i) => {
      const { promise, resolve } = Promise.withResolvers<void>()
      engine.submit(sequenceRequest({ topLogprobs: i === 1 ? 1 : undefined }), {
        onToken: (token, logprobs) => {
          list.push(logprobs && logprobs.top[0]!.token - token)
        },
        onFinish: () => resolve(),
      })
      return promise
    }),
  )
  // Greedy: the likeliest token is the chosen one.
  assert.deepEqual(got, [Array(8).fill(undefined), Array(8).fill(0)])
  await engine.close()
})

for (const kind of ['throw', 'crash', 'exit'] as const) {
  test(`a backend that ends by ${kind} leaves someone waiting`, { timeout: 10_000 }, async () => {
    const engine = await start({ backend: { fault: { atStep: 5, kind }, stepMs: 1 } })
    const asked = Array.from({ length: 6 }, () => ask(engine, { maxTokens: 50 }))
    await until(() => asked[0]!.tokens.length > 0)
    const [snapshot] = await Promise.allSettled([engine.snapshot()])
    for (const { answer } of asked) {
      const { reason, tokens, outputTokens, error } = await answer
      assert.equal(reason, 'error')
      assert.equal(outputTokens, tokens.length)
      const codes = { throw: 'backend_failed', crash: 'internal', exit: 'engine_stopped' }
      assert.equal(error?.code, codes[kind])
    }
    if (snapshot.status === 'rejected') assert.equal(snapshot.reason.code, 'engine_stopped')
    await checkStopped(engine)
    // What happened stays known.
    if (kind === 'throw') assert.match(refusal(() => ask(engine)).message, /null backend failed/)
  })
}

test('a thread that is killed leaves someone waiting', { timeout: 10_000 }, async () => {
  const engine = await start({ backend: { stepMs: 50 } })
  const asked = Array.from({ length: 6 }, () => ask(engine, { maxTokens: 50 }))
  await until(() => asked[0]!.tokens.length > 0)
  const snapshot = assert.rejects(engine.snapshot(), { code: 'engine_stopped' })
  const question = assert.rejects(engine.ask({ kind: 'map' }), { code: 'engine_stopped' })
  const drained = engine.drain()
  await (engine as unknown as { worker: Worker }).worker.terminate()
  await snapshot
  await question
  await drained
  for (const { answer } of asked) {
    const { reason, tokens, outputTokens, error } = await answer
    assert.deepEqual([reason, error?.code], ['error', 'engine_stopped'])
    assert.equal(outputTokens, tokens.length)
  }
  await checkStopped(engine)
})

test('a backend that cannot start hangs the start', { timeout: 10_000 }, async () => {
  const options = { contextLength: 8, maxSequences: 1, stepTokens: 8, kvBytes: 1 << 20 }
  const model = { id: 'x', architecture: 'none', contextLength: 8, vocabSize: VOCAB }
  const limits = { sequences: 1, contextLength: 8 }
  const modelPath = '/there/is/no/model.gguf'
  await assert.rejects(
    EngineClient.start(
      { ...options, backend: { kind: 'cpu', modelPath, cpus: [0] } },
      model,
      limits,
    ),
    LatticeError,
  )
  const backend = { kind: 'null' as const, vocab: -1 }
  await assert.rejects(EngineClient.start({ ...options, backend }, model, limits), LatticeError)
})

test('draining takes new sequences, or ends before the last has', async () => {
  const engine = await start({ backend: { stepMs: 2 } })
  const { answer, tokens } = ask(engine, { maxTokens: 20 })
  const drained = engine.drain()
  assert.equal(refusal(() => ask(engine)).code, 'draining')
  await drained
  assert.equal(tokens.length, 20)
  assert.equal((await answer).reason, 'length')
  await engine.drain()
  await engine.close()
})

test('closing leaves a sequence without an end', { timeout: 10_000 }, async () => {
  const engine = await start({ backend: { stepMs: 2 } })
  const asked = Array.from({ length: 6 }, () => ask(engine, { maxTokens: 70 }))
  await until(() => asked[0]!.tokens.length > 0)
  await Promise.all([engine.close(), engine.close()])
  for (const { answer, tokens } of asked) {
    const { reason, error, outputTokens } = await answer
    assert.deepEqual([reason, error?.code], ['error', 'engine_stopped'])
    assert.equal(outputTokens, tokens.length)
  }
  await checkStopped(engine)
})

test('the queue grows beyond its bound, or never takes anyone again', async () => {
  const engine = await start({ backend: { stepMs: 1 }, maxSequences: 1, queue: 2 })
  assert.equal(engine.queueRoom(), 3)
  const asked = Array.from({ length: 3 }, () => ask(engine))
  assert.equal(engine.queueRoom(), 0)
  const error = refusal(() => ask(engine))
  assert.equal(error.code, 'queue_full')
  assert.match(error.message, /3 sequences/)
  asked[2]!.abort()
  assert.equal((await asked[2]!.answer).reason, 'abort')
  assert.equal(engine.queueRoom(), 1)
  const choice = { sampling: GREEDY, sink: { onToken() {}, onFinish() {} } }
  const tooMany = refusal(() => engine.submitChoices(sequenceRequest(), [choice, choice]))
  assert.equal(tooMany.code, 'queue_full')
  assert.equal((await ask(engine).answer).reason, 'length')
  await engine.drain()
  assert.equal(engine.queueRoom(), 3)
  await engine.close()
})

test('what can never run is queued', async () => {
  const engine = await start({ kvBytes: 20 * KV.pageBytes })
  const long = refusal(() => ask(engine, { prompt: new Int32Array(60), maxTokens: 21 }))
  assert.equal(long.code, 'context_length_exceeded')
  assert.match(long.message, /60 tokens.* 21 more.* 80/)
  // 20 pages are 40 tokens.
  const large = refusal(() => ask(engine, { prompt: new Int32Array(30), maxTokens: 11 }))
  assert.equal(large.code, 'kv_memory_exhausted')
  assert.match(large.message, /22 .*5632|5632.*5120/)
  const wrong: Partial<SequenceRequest>[] = [
    { prompt: new Int32Array(0) },
    { prompt: Int32Array.of(3, VOCAB) },
    { prompt: Int32Array.of(-1) },
    { maxTokens: 0 },
    { maxTokens: Number.NaN },
    { maxTokens: 1.5 },
  ]
  for (const change of wrong) {
    assert.equal(refusal(() => ask(engine, change)).code, 'invalid_request', JSON.stringify(change))
  }
  assert.equal(engine.queueRoom(), 104, 'a refused sequence takes a place')
  const fits = await ask(engine, { prompt: new Int32Array(30), maxTokens: 10 }).answer
  assert.equal(fits.reason, 'length')
  await engine.close()
})

test('one sequence that fails while running stops the engine', async () => {
  const engine = await start()
  const bad = await ask(engine, { sampling: { ...GREEDY, topK: 0.5 } }).answer
  assert.deepEqual([bad.reason, bad.error?.code], ['error', 'invalid_request'])
  assert.equal((await ask(engine).answer).reason, 'length')
  await engine.close()
})

test('a snapshot during a long step hangs, or an abort waits for more than that step', async () => {
  const engine = await start({ backend: { stepMs: 800 } })
  const { answer, abort, tokens } = ask(engine, { maxTokens: 50 })
  await until(() => tokens.length > 0)
  const startMs = performance.now()
  const snapshot = await engine.snapshot()
  assert.ok(performance.now() - startMs < 600)
  assert.equal(snapshot.sequences.length, 1)
  assert.equal(snapshot.sequences[0]!.state, 'decode')
  const known = tokens.length
  abort()
  assert.equal((await answer).reason, 'abort')
  assert.ok(tokens.length <= known + 1)
  const { kv, sequences } = await engine.snapshot()
  assert.deepEqual([kv.residentBytes, sequences.length], [0, 0])
  await engine.close()
})

test('an engine that sleeps is not woken by a request, but by a timer', async (t) => {
  const engine = await start()
  const micros: number[] = []
  for (let i = 0; i < 50; i++) {
    await sleep(2)
    const startMs = performance.now()
    await ask(engine, { maxTokens: 1 }).answer
    micros.push((performance.now() - startMs) * 1000)
  }
  micros.sort((a, b) => a - b)
  t.diagnostic(`from submit to the answer, both ways: median ${Math.round(micros[25]!)} µs`)
  assert.ok(micros[25]! < 5000)
  await engine.close()
})

test('an idle engine keeps memory, or keeps a core busy', async () => {
  const engine = await start()
  await Promise.all(Array.from({ length: 4 }, () => ask(engine, { maxTokens: 40 }).answer))
  await sleep(100)
  const { kv, steps } = await engine.snapshot()
  assert.deepEqual([kv.usedPages, kv.residentBytes], [0, 0])
  const before = process.cpuUsage()
  await sleep(200)
  const { user, system } = process.cpuUsage(before)
  assert.ok(user + system < 100_000, `${user + system} µs of CPU in 200 ms of rest`)
  assert.equal((await engine.snapshot()).steps, steps)
  await engine.close()
})

test('a fork across threads is told other tokens than its parent, or never ends', async () => {
  const engine = await start({ backend: { stepMs: 5 } })
  const parent = ask(engine, { maxTokens: 70 })
  const tokens: number[] = []
  const ended = Promise.withResolvers<void>()
  const sink = {
    onToken: (token: number) => void tokens.push(token),
    onFinish: () => ended.resolve(),
  }
  const fork = parent.fork({ sampling: GREEDY, sink })
  await ended.promise
  const { tokens: whole } = await parent.answer
  assert.deepEqual(tokens, whole)
  assert.equal(refusal(() => fork.fork({ sampling: GREEDY, sink })).code, 'not_found')
  await engine.close()
})
