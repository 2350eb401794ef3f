// Owns the checks of `lattice bench serve`: times against a server that knows when it wrote,
// definitions against numbers worked out by hand.

import assert from 'node:assert/strict'
import { mkdtempSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { measured } from '../../test/support/busy.ts'
import { FakeSseServer, type Script } from '../../test/support/fake-sse-server.ts'
import { LatticeError } from '../errors.ts'
import { BenchClient, type Outcome } from './serve-client.ts'
import { datasetPrompts } from './serve-prompts.ts'
import { parseGoodput, percentile, totalsOf } from './serve-report.ts'
import { arrivalsMs, runServeBench, type ServeBenchOptions } from './serve.ts'

const QUICK: Script = { ttftMs: 1, gapMs: 1, tokens: 2 }

const OPTIONS: Omit<ServeBenchOptions, 'url'> = {
  apiKey: undefined,
  model: undefined,
  endpoint: 'completions',
  numPrompts: 4,
  requestRate: Infinity,
  burstiness: 1,
  maxConcurrency: undefined,
  numWarmups: 0,
  randomInputLen: 5,
  randomOutputLen: 6,
  randomRangeRatio: 0,
  dataset: undefined,
  temperature: 0,
  ignoreEos: false,
  goodput: {},
  percentileMetrics: ['ttft', 'tpot', 'itl', 'e2el'],
  percentiles: [99],
  seed: 1,
  timeoutMs: 5_000,
}

async function served<T>(
  script: Script | ((index: number) => Script),
  use: (server: FakeSseServer, url: string) => Promise<T>,
): Promise<T> {
  const server = new FakeSseServer(typeof script === 'function' ? script : () => script)
  try {
    return await use(server, await server.listen())
  } finally {
    server.close()
  }
}

const run = (url: string, change: Partial<ServeBenchOptions> = {}) =>
  runServeBench({ ...OPTIONS, url, ...change }, () => {})

/** How late the client may see what the server wrote, on a busy machine. */
const LATE_MS = 15

function within(actual: number | null | undefined, expected: number, what: string): void {
  assert.ok(
    typeof actual === 'number' && Math.abs(actual - expected) < LATE_MS,
    `${what} ${actual}`,
  )
}

for (const chat of [false, true]) {
  const name = chat ? 'chat' : 'completions'
  test(`times of ${name} differ from when the server wrote`, () =>
    measured(() =>
      served({ ttftMs: 60, gapMs: 25, tokens: 5, chat }, async (server, url) => {
        const report = await run(url, { endpoint: name, numPrompts: 1 })
        const [{ arrived, written, body, path }] = server.served as [(typeof server.served)[0]]
        const first = written[0]! - arrived
        const whole = written.at(-1)! - arrived
        assert.ok(first >= 59 && whole - first >= 96, 'the server kept its times')
        within(report.mean_ttft_ms, first, 'ttft')
        within(report.mean_e2el_ms, whole, 'e2el')
        within(report.mean_itl_ms, (whole - first) / 4, 'itl')
        within(report.mean_tpot_ms, (whole - first) / 4, 'tpot')
        assert.equal(report.total_output_tokens, 5)
        assert.equal(report.total_input_tokens, 7, "the server's own count")
        assert.equal(report.backend, chat ? 'openai-chat' : 'openai')
        assert.equal(report.model_id, 'fake-model')
        assert.deepEqual(report.notes, [])
        assert.equal(path, chat ? '/v1/chat/completions' : '/v1/completions')
        assert.deepEqual(body['stream_options'], { include_usage: true })
        assert.equal(body[chat ? 'max_completion_tokens' : 'max_tokens'], 6)
        assert.ok(!('ignore_eos' in body))
      }),
    ))
}

test('a failed request is timed, or passes uncounted', () =>
  served(
    (i) => ({ ...QUICK, ...([{}, ...FAILURES][i] as Partial<Script>) }),
    async (server, url) => {
      const numPrompts = FAILURES.length + 1
      const report = await run(url, { numPrompts, maxConcurrency: 1, timeoutMs: 150 })
      assert.equal(server.served.length, numPrompts)
      assert.equal(report.completed, 1)
      assert.equal(report.failed, FAILURES.length)
      assert.equal(report.total_output_tokens, 2)
      assert.ok(report.request_throughput > 0)
      const notes = report.notes.join('\n')
      for (const what of ['HTTP 429: busy', 'aborted', 'out of luck', 'silent for 0.15 s']) {
        assert.match(notes, new RegExp(`1 failed: .*${what}`))
      }
    },
  ))
const FAILURES: Partial<Script>[] = [
  { failure: 'status' },
  { failure: 'cut' },
  { failure: 'event' },
  { failure: 'silence' },
]

test('a server that refuses everything passes for a measurement', () =>
  served({ ...QUICK, failure: 'status' }, async (_, url) => {
    await assert.rejects(
      run(url, { numWarmups: 1 }),
      (error: unknown) => error instanceof LatticeError && /HTTP 429: busy/.test(error.message),
    )
    const report = await run(url)
    assert.equal(report.completed, 0)
    assert.equal(report.mean_ttft_ms, null)
  }))

test('without usage, output tokens are not counted by events, or nobody is told', () =>
  served({ ...QUICK, tokens: 4, uncounted: true }, async (_, url) => {
    const report = await run(url, { numPrompts: 2 })
    assert.equal(report.total_output_tokens, 8)
    assert.equal(report.total_input_tokens, 10)
    assert.match(report.notes.join(), /no usage/)
  }))

test('random prompts do not have the length asked for, or change with the same seed', () =>
  served(QUICK, async (server, url) => {
    const count = (i: number) =>
      (server.served[i]!.body['prompt'] as string).replaceAll('education', 'e e').split(' ').length
    await run(url, { numPrompts: 20, randomInputLen: 30, ignoreEos: true })
    for (let i = 0; i < 20; i++) assert.equal(count(i), 30)
    assert.equal(server.served[0]!.body['ignore_eos'], true)
    await run(url, { numPrompts: 20, randomInputLen: 30 })
    const prompts = server.served.map(({ body }) => body['prompt'])
    assert.deepEqual(prompts.slice(20).toSorted(), prompts.slice(0, 20).toSorted())
    assert.equal(new Set(prompts).size, 20)

    await run(url, { numPrompts: 60, randomInputLen: 10, randomRangeRatio: 0.5, seed: 2 })
    const lengths = server.served.slice(40).map((_, i) => count(40 + i))
    assert.ok(Math.min(...lengths) === 5 && Math.max(...lengths) === 15, String(lengths))
    const asked = server.served.slice(40).map(({ body }) => body['max_tokens'] as number)
    assert.ok(Math.min(...asked) === 3 && Math.max(...asked) === 9, String(asked))

    server.tokenizes = false
    const report = await run(url, { numPrompts: 1, randomInputLen: 30 })
    assert.match(report.notes.join(), /words/)
  }))

test('more requests run at once than max-concurrency, or they wait for nothing', () =>
  served({ ttftMs: 20, gapMs: 1, tokens: 1 }, async (server, url) => {
    await run(url, { numPrompts: 12, maxConcurrency: 3 })
    assert.equal(server.runningMax, 3)
    await run(url, { numPrompts: 12 })
    assert.equal(server.runningMax, 12)
  }))

test('requests do not come at the rate asked for', () =>
  measured(() =>
    served(QUICK, async (server, url) => {
      const report = await run(url, { numPrompts: 20, requestRate: 50 })
      const times = server.served.map(({ arrived }) => arrived)
      const first = arrivalsMs(20, { ...OPTIONS, requestRate: 50 })[0]!
      within(times.at(-1)! - times[0]!, 400 - first, 'all')
      assert.ok(report.duration >= 0.4 && report.duration < 0.6, String(report.duration))
      assert.equal(report.request_rate, 50)
    }),
  ))

test('gaps between requests lack the spread of their burstiness', () => {
  for (const burstiness of [0.25, 1, 4]) {
    const count = 20_000
    const times = arrivalsMs(count, { requestRate: 100, burstiness, seed: 5 })
    const gaps = times.map((t, i) => t - (times[i - 1] ?? 0))
    assert.ok(gaps.every((gap) => gap >= 0))
    assert.ok(Math.abs(times.at(-1)! - count * 10) < 1e-6)
    const variance = gaps.reduce((sum, gap) => sum + (gap - 10) ** 2, 0) / count
    // A gamma distribution of mean 10 and this shape has variance 100 / shape.
    assert.ok(Math.abs((variance * burstiness) / 100 - 1) < 0.1, `${burstiness}: ${variance}`)
  }
})

function outcome(ttftMs: number, gaps: number[], tokens: number): Outcome {
  const latencyMs = ttftMs + gaps.reduce((sum, gap) => sum + gap, 0)
  const counts = { promptTokens: 10, outputTokens: tokens }
  return { ok: true, error: '', ttftMs, itlsMs: gaps, latencyMs, ...counts }
}

test("a metric departs from vLLM's definition", () => {
  const outcomes = [
    outcome(100, [10, 20, 30], 4), // tpot 20, e2el 160
    outcome(300, [40], 3), // two tokens in one event: tpot 20, e2el 340
    outcome(50, [], 1), // no tpot
    { ...outcome(9, [9], 9), ok: false },
  ]
  const samples = outcomes.map((o) => ({ outcome: o, promptTokens: 3 }))
  const options = { metrics: ['ttft', 'tpot', 'itl', 'e2el'] as const, percentiles: [50, 99] }
  const totals = totalsOf(samples, 2_000, { ...options, goodput: { ttft: 200, tpot: 20 } })
  const expected = {
    duration: 2,
    completed: 3,
    failed: 1,
    total_input_tokens: 30,
    total_output_tokens: 8,
    request_throughput: 1.5,
    request_goodput: 1,
    output_throughput: 4,
    total_token_throughput: 19,
    mean_ttft_ms: 150,
    median_ttft_ms: 100,
    std_ttft_ms: Math.sqrt((50 ** 2 + 150 ** 2 + 100 ** 2) / 3),
    p50_ttft_ms: 100,
    p99_ttft_ms: 100 + 200 * 0.98,
    mean_tpot_ms: 20,
    median_tpot_ms: 20,
    std_tpot_ms: 0,
    p50_tpot_ms: 20,
    p99_tpot_ms: 20,
    mean_itl_ms: 25,
    median_itl_ms: 25,
    std_itl_ms: Math.sqrt(125),
    p50_itl_ms: 25,
    p99_itl_ms: 30 + 10 * 0.97,
    mean_e2el_ms: 550 / 3,
    median_e2el_ms: 160,
  }
  for (const [key, value] of Object.entries(expected)) {
    const actual = totals[key as keyof typeof totals]
    assert.ok(typeof actual === 'number' && Math.abs(actual - value) < 1e-9, `${key} ${actual}`)
  }
  assert.equal(totalsOf(samples, 1, { ...options, goodput: {} }).request_goodput, null)
  const all = totalsOf(samples, 1_000, { ...options, goodput: { e2el: 340 } })
  assert.equal(all.request_goodput, 3)
  const bare = totalsOf(samples, 1, { ...options, goodput: {}, metrics: [] })
  assert.deepEqual(Object.keys(bare), Object.keys(expected).slice(0, 9))
  assert.equal(percentile([], 50), null)
})

test('goodput of a whole run counts slow requests', () =>
  served(
    (i) => ({ ...QUICK, ttftMs: i % 2 === 0 ? 1 : 120 }),
    async (_, url) => {
      const report = await run(url, { numPrompts: 6, goodput: { ttft: 100 } })
      assert.ok(Math.abs(report.request_goodput! - 3 / report.duration) < 1e-9)
    },
  ))

test('a goodput that cannot be meant is taken', () => {
  assert.deepEqual(parseGoodput(['ttft:500', 'e2el:20.5']), { ttft: 500, e2el: 20.5 })
  for (const wrong of ['itl:5', 'ttft', 'ttft:-1', 'ttft:fast', ':5']) {
    assert.throws(() => parseGoodput([wrong]), LatticeError)
  }
})

test('a dataset is read wrongly, or a broken line passes', () => {
  const file = join(mkdtempSync(join(tmpdir(), 'lattice-bench-')), 'prompts.jsonl')
  writeFileSync(file, '{"prompt": "a b", "output_tokens": 3, "id": 1}\n{"prompt": "é"}\n\n')
  assert.deepEqual(datasetPrompts(file, 3, 9), [
    { text: 'a b', tokens: 2, maxTokens: 3 },
    { text: 'é', tokens: 1, maxTokens: 9 },
    { text: 'a b', tokens: 2, maxTokens: 3 },
  ])
  for (const [text, what] of [
    ['{"prompt": "a"}\nnope\n', /line 2 is not JSON/],
    ['{"text": "a"}', /line 1 has no "prompt"/],
    ['null', /line 1 has no "prompt"/],
    ['{"prompt": "a", "output_tokens": 0}', /"output_tokens"/],
    ['', /has no prompts/],
  ] as const) {
    writeFileSync(file, text)
    assert.throws(() => datasetPrompts(file, 1, 1), what)
  }
  assert.throws(() => datasetPrompts(`${file}.missing`, 1, 1), LatticeError)
})

test('an address with a path in front of /v1 loses it, or a dead one hangs', async () => {
  await served(QUICK, async (server, url) => {
    const target = { url: new URL(`${url}/proxy/`), apiKey: 'secret', timeoutMs: 1_000 }
    const client = new BenchClient(target)
    const { ok } = await client.stream('/v1/completions', {})
    assert.ok(ok)
    assert.equal(server.served[0]!.path, '/proxy/v1/completions')
    client.close()
  })
  const url = await served(QUICK, async (_, address) => address)
  const client = new BenchClient({ url: new URL(url), apiKey: undefined, timeoutMs: 1_000 })
  const outcome = await client.stream('/v1/completions', {})
  assert.match(outcome.error, /ECONNREFUSED/)
  await assert.rejects(client.json('/v1/models', undefined), /ECONNREFUSED/)
})
