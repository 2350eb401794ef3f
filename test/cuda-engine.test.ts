// Catches an engine on a GPU that mixes up sequences: steps queued ahead, slots that change hands,
// shared prompts, stops and aborts, on a mocked GPU whose kernels are JavaScript.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { type BeamParams, GREEDY, type SamplingParams } from '../src/engine/api.ts'
import { CudaBackend } from '../src/backends/cuda/backend.ts'
import type { CoreOptions } from '../src/engine/core-contract.ts'
import { CudaDevice } from '../src/backends/cuda/device.ts'
import { HostTier } from '../src/backends/cuda/host-tier.ts'
import { gpuKvLayout } from '../src/backends/cuda/kv-layout.ts'
import { CudaKvMemory } from '../src/backends/cuda/kv-memory.ts'
import type { ModuleCache } from '../src/backends/cuda/module-cache.ts'
import { warmUp } from '../src/backends/cuda/warm-up.ts'
import { InlinePager } from '../src/backends/cuda/pager.ts'
import { tokenMajor } from '../src/kv/layout.ts'
import { regionsFor } from '../src/kv/regions.ts'
import { Golden } from './arch/golden.ts'
import { referenceBeams } from './support/beam-reference.ts'
import { MockCuda } from './support/mock-cuda.ts'
import { MockAttention, MockKernels } from './support/mock-kernels.ts'
import { Bench, sequenceRequest } from './support/null-engine.ts'

const SLOTS = 4
const CONTEXT = 48
const PAGE_BYTES = 1 << 12

const modules = {
  folder: '/nonexistent',
  get: () => ({ image: new Uint8Array(), log: undefined }),
} as unknown as ModuleCache

/** What is queued on the mock runs when somebody waits for it. */
class MockedBackend extends CudaBackend {
  cuda: MockCuda | undefined
  /** Every token is chosen from logits by the host. */
  hosted = false

  override takes(params: SamplingParams, topLogprobs?: number): boolean {
    return !this.hosted && super.takes(params, topLogprobs)
  }

  override tokensOf(step: number): Int32Array {
    this.cuda?.synchronizeStream(this.forward.stream)
    return super.tokensOf(step)
  }
}

function engine(
  golden: Golden,
  kvPages: number,
  options: { prefixPages?: number; hostFrames?: number; hosted?: boolean; group?: number } = {},
): { bench: Bench; end(): void } {
  const { prefixPages = 0, hostFrames = 0, hosted = false, group } = options
  const cuda = new MockCuda({ pageBytes: PAGE_BYTES, totalBytes: 1 << 28 })
  const device = CudaDevice.open(0, cuda)
  const { config } = golden.model
  const kernels = new MockKernels(cuda, config)
  const { shape } = gpuKvLayout(config, CONTEXT, PAGE_BYTES)
  const layout = tokenMajor(group === undefined ? shape : { ...shape, shareColumns: group })
  const kv = new CudaKvMemory(device, layout, new InlinePager(device, false), {
    slots: SLOTS,
    regions: regionsFor(SLOTS),
    limitPages: kvPages,
    idleReleaseMs: 0,
  })
  if (hostFrames > 0) kv.tier = new HostTier(device, kv, { frames: hostFrames })
  const backend = new MockedBackend(golden.model, {
    device,
    modules,
    kv,
    maxSequences: SLOTS,
    stepTokens: 24,
    tune: false,
    skinny: false,
    lt: kernels.lt,
    attention: () => new MockAttention(kernels, kv.address, layout),
  })
  backend.cuda = cuda
  backend.hosted = hosted
  // As at every start: whoever comes first notices nothing.
  warmUp(backend)
  kv.check()
  const memory = { maxSequences: SLOTS, kvPages, prefixPages, greedy: true, comeBack: 'moved' }
  const bench = new Bench(backend, memory as CoreOptions)
  const end = (): void => {
    backend.close()
    device.close()
  }
  return { bench, end }
}

test('sequences that run together on a GPU say other than each alone', () => {
  const golden = new Golden('llama3')
  const { tokens } = golden.sequence(1)
  const lengths = [9, 14, 9, 3, 20, 14, 1]
  const requests = lengths.map((length, i) =>
    sequenceRequest({ prompt: Int32Array.from(tokens.slice(0, length)), maxTokens: 3 + i }),
  )
  const pages = Math.ceil((CONTEXT * 4096) / PAGE_BYTES)
  const alone = engine(golden, pages, { hosted: true })
  requests.forEach((request, id) => {
    alone.bench.submit(id, { ...request, topLogprobs: 2 })
    alone.bench.runAll()
  })
  const together = engine(golden, pages, { prefixPages: pages >> 1 })
  // One of them has log-probabilities, one stops, one is aborted.
  const stop = alone.bench.outcome(4).tokens[3]!
  requests.forEach((request, id) => {
    const topLogprobs = id === 1 ? 2 : undefined
    together.bench.submit(id, { ...request, topLogprobs, stopTokens: id === 4 ? [stop] : [] })
  })
  for (let i = 0; i < 4; i++) together.bench.step()
  together.bench.core.abort(0)
  together.bench.core.check()
  together.bench.runAll()
  requests.forEach((_, id) => {
    const { tokens: expected } = alone.bench.outcome(id)
    const { tokens: got, reason } = together.bench.outcome(id)
    if (id === 0) assert.deepEqual({ reason, got }, { reason, got: expected.slice(0, got.length) })
    else assert.deepEqual(got, id === 4 ? expected.slice(0, expected.indexOf(stop)) : expected)
    const { argmax, gap, rms } = golden.sequence(1)
    const last = lengths[id]! - 1
    if (gap[last]! > 0.15 * rms[last]!) assert.equal(expected[0], argmax[last])
  })
  const [want, got] = [alone, together].map(({ bench }) => bench.outcome(1).logprobs)
  want!.forEach((one, i) => {
    const found = got![i]!
    assert.ok(Math.abs(found.logprob - one!.logprob) < 1e-4)
    assert.deepEqual(
      found.top.map(({ token }) => token),
      one!.top.map(({ token }) => token),
    )
  })
  assert.ok(Math.abs(together.bench.outcome(1).score! - alone.bench.outcome(1).score!) < 1e-4)
  alone.end()
  together.end()
})

test('choices of one prompt compute it each, or say different things', () => {
  const golden = new Golden('llama3')
  const prompt = Int32Array.from(golden.sequence(1).tokens.slice(0, 11))
  const { bench, end } = engine(golden, 200)
  const request = sequenceRequest({ prompt, maxTokens: 6 })
  bench.submitChoices([0, 1, 2], request, [GREEDY, GREEDY, GREEDY])
  bench.runAll()
  const first = bench.outcome(0).tokens
  for (const id of [1, 2]) assert.deepEqual(bench.outcome(id).tokens, first)
  assert.ok(bench.core.snapshot().promptTokens < 3 * prompt.length, 'the prompt is shared')
  end()
})

test('beams on a GPU find other answers than a plain search, or stop it', () => {
  const golden = new Golden('llama3')
  const { vocab } = golden.model.config
  const prompt = golden.sequence(1).tokens.slice(0, 7)
  const beams: BeamParams = { width: 3, lengthPenalty: 1, earlyStopping: false }
  const plain = engine(golden, 400, { hosted: true })
  let asked = 0
  const logprobsAfter = (tokens: readonly number[]): number[] => {
    const request = { prompt: Int32Array.of(...prompt, ...tokens), maxTokens: 1 }
    plain.bench.submit(asked, sequenceRequest({ ...request, topLogprobs: vocab }))
    plain.bench.runAll()
    const { top } = plain.bench.outcome(asked++).logprobs[0]!
    const logprobs = Array.from({ length: vocab }, () => -Infinity)
    for (const { token, logprob } of top) logprobs[token] = logprob
    return logprobs
  }
  const expected = referenceBeams(beams, 6, [], logprobsAfter)
  plain.end()
  // Of pages of a token each, two are shared at a time.
  const { bench, end } = engine(golden, 400, { group: 2 })
  // One beside them goes on where they fork.
  bench.submit(3, sequenceRequest({ prompt: Int32Array.from(prompt), maxTokens: 20 }))
  const search = sequenceRequest({ prompt: Int32Array.from(prompt), maxTokens: 6, beams })
  bench.submitChoices([0, 1, 2], search, [])
  bench.runAll()
  expected.forEach(({ tokens, score }, id) => {
    const found = bench.outcome(id)
    assert.deepEqual(found.tokens, tokens, `answer ${id}`)
    assert.ok(Math.abs(found.score! - score) < 1e-4, `${found.score} for ${score}`)
  })
  end()
})

test('a sequence that was in memory of the host goes on with tokens of others', () => {
  const golden = new Golden('llama3')
  const { tokens } = golden.sequence(1)
  const requests = [9, 14, 12, 10].map((length, i) =>
    sequenceRequest({ prompt: Int32Array.from(tokens.slice(i, i + length)), maxTokens: 20 }),
  )
  const pages = Math.ceil((CONTEXT * 4096) / PAGE_BYTES)
  const alone = engine(golden, pages)
  requests.forEach((request, id) => {
    alone.bench.submit(id, request)
    alone.bench.runAll()
  })
  // Of a page eight tokens fill, each comes to need five.
  const pushed = engine(golden, 9, { hostFrames: 20 })
  requests.forEach((request, id) => pushed.bench.submit(id, request))
  pushed.bench.runAll()
  const { tier } = pushed.bench.core.snapshot()
  assert.ok(tier!.offloads > 0 && tier!.loadedBytes > 0, JSON.stringify(tier))
  requests.forEach((_, id) => {
    assert.deepEqual(pushed.bench.outcome(id).tokens, alone.bench.outcome(id).tokens)
  })
  alone.end()
  pushed.end()
})
