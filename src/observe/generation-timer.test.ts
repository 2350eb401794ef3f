import assert from 'node:assert/strict'
import { test } from 'node:test'
import { fakeApp } from '../../test/support/fake-server.ts'
import { post } from '../../test/support/http.ts'
import { GenerationTimer } from './generation-timer.ts'
import { ServerMetrics } from './server-metrics.ts'

/** The value of a sample line such as `name_count`. */
function sample(text: string, name: string): number {
  const line = text.split('\n').find((candidate) => candidate.startsWith(`${name} `))
  return Number(line?.slice(name.length + 1))
}

test('a choice counts once in latency and length, its later tokens in intervals', async () => {
  const { app } = fakeApp()
  const body = { messages: [{ role: 'user', content: 'hi' }], n: 2 }
  await post(app.request, '/v1/chat/completions', body)
  await post(app.request, '/v1/chat/completions', { ...body, n: 1, max_tokens: 3 })
  const text = await (await app.request('/metrics')).text()
  const count = (name: string): number => sample(text, `lattice_${name}_count`)
  assert.equal(count('request_queue_time_seconds'), 3)
  assert.equal(count('time_to_first_token_seconds'), 3)
  assert.equal(count('e2e_request_latency_seconds'), 3)
  assert.equal(count('request_time_per_output_token_seconds'), 3)
  // 'Hello!' is six tokens and an end token that is counted but not delivered.
  assert.equal(count('inter_token_latency_seconds'), 5 + 5 + 2)
  assert.equal(sample(text, 'lattice_request_generation_tokens_sum'), 7 + 7 + 3)
  assert.equal(sample(text, 'lattice_generation_tokens_total'), 7 + 7 + 3)
  assert.equal(sample(text, 'lattice_request_prompt_tokens_sum'), 22 + 22)
  assert.equal(sample(text, 'lattice_request_params_n_sum'), 3)
  assert.equal(sample(text, 'lattice_request_success_total{finished_reason="stop"}'), 2)
  assert.equal(sample(text, 'lattice_request_success_total{finished_reason="length"}'), 1)
  const chat = '{path="/v1/chat/completions",method="POST",status="200"}'
  assert.equal(sample(text, `lattice_http_requests_total${chat}`), 2)
})

test('tokens that arrive together share the time that passed', () => {
  const metrics = new ServerMetrics()
  const startMs = performance.now()
  const timer = new GenerationTimer(metrics, startMs, 1)
  const token = { token: 1, logprobs: undefined }
  timer.see({ kind: 'delta', choice: 0, text: 'a', tokens: [token] })
  const firstMs = performance.now()
  while (performance.now() - firstMs < 4);
  timer.see({ kind: 'delta', choice: 0, text: 'bcd', tokens: [token, token, token] })
  const passedMs = performance.now() - firstMs
  const text = metrics.text(undefined)
  assert.equal(sample(text, 'lattice_inter_token_latency_seconds_count'), 3)
  const sumMs = sample(text, 'lattice_inter_token_latency_seconds_sum') * 1000
  assert.ok(sumMs >= 4 && sumMs <= passedMs + 1, `${sumMs} of ${passedMs} ms`)
})
