import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import { LatticeError } from '../errors.ts'
import { configFromJson } from './config-json.ts'
import { canonicalName } from './hf-names.ts'
import { JsonObject } from './json.ts'
import type { RopeConfig, TensorRef } from './model.ts'
import { checkWeights } from './weights.ts'

/** Written by tools/goldens/model_configs.py from transformers' own classes. */
interface Golden {
  name: string
  old: Record<string, unknown>
  saved: Record<string, unknown>
  expected: {
    frequencies: number[]
    localFrequencies?: number[]
    cosSinFactor: number
    window: number | null
    local: boolean[]
    attentionScale: number
    embeddingScale: number
    normEps: number
    headDim: number
    kvHeads: number
    contextLength: number
    tied: boolean
    tensors: Record<string, number[]>
  }
}

const goldens = JSON.parse(
  readFileSync(new URL('../../test/goldens/model-configs.json', import.meta.url), 'utf8'),
) as Golden[]

function read(json: unknown) {
  return configFromJson(new JsonObject(json, 'config.json'), 'name')
}

/** Angles a position turns each pair by; YaRN as in section 3.2 of Peng et al. 2023. */
function frequencies({ base, dimensions, scaling }: RopeConfig): number[] {
  return Array.from({ length: dimensions / 2 }, (_, i) => {
    const plain = base ** ((-2 * i) / dimensions)
    if (scaling.kind === 'linear') return plain / scaling.factor
    if (scaling.kind === 'factors') return plain / (scaling.divisors[i] ?? 0)
    if (scaling.kind === 'none') return plain
    const { factor, originalContext, betaFast, betaSlow } = scaling
    const dimensionOf = (turns: number) =>
      (dimensions * Math.log(originalContext / (turns * 2 * Math.PI))) / (2 * Math.log(base))
    const low = Math.max(0, Math.floor(dimensionOf(betaFast)))
    const high = Math.min(dimensions - 1, Math.ceil(dimensionOf(betaSlow)))
    const ramp = Math.min(1, Math.max(0, (i - low) / (high === low ? 0.001 : high - low)))
    return plain * (1 - ramp) + (plain / factor) * ramp
  })
}

function assertClose(actual: readonly number[], expected: readonly number[], what: string): void {
  assert.equal(actual.length, expected.length, what)
  actual.forEach((value, i) => {
    const wanted = expected[i] ?? Number.NaN
    assert.ok(
      Math.abs(value - wanted) <= 3e-6 * Math.abs(wanted),
      `${what} ${i}: ${value} ${wanted}`,
    )
  })
}

for (const { name, old, saved, expected } of goldens) {
  for (const [age, json] of Object.entries({ old, saved })) {
    test(`${name}, ${age} layout: the configuration is what transformers makes of it`, () => {
      const described = read(json)
      const { config } = described
      assertClose(frequencies(config.rope), expected.frequencies, 'frequency')
      if (expected.localFrequencies !== undefined) {
        assert.ok(config.ropeLocal)
        assertClose(frequencies(config.ropeLocal), expected.localFrequencies, 'local frequency')
      }
      const { scaling } = config.rope
      const factor = scaling.kind === 'yarn' ? scaling.attentionFactor : 1
      assertClose([factor], [expected.cosSinFactor], 'factor on cos and sin')
      const none = expected.local.map(() => false)
      assert.equal(config.slidingWindow?.tokens ?? null, expected.window)
      assert.deepEqual(config.slidingWindow?.layers ?? none, expected.local)
      assertClose([config.attentionScale], [expected.attentionScale], 'attention scale')
      assertClose([config.embeddingScale], [expected.embeddingScale], 'embedding scale')
      assert.equal(config.normEps, expected.normEps)
      assert.equal(config.headDim, expected.headDim)
      assert.equal(config.kvHeads, expected.kvHeads)
      assert.equal(config.contextLength, expected.contextLength)
      assert.equal(described.tiedOutput, expected.tied ? 'yes' : 'no')
    })
  }

  test(`${name}: every tensor that transformers has is expected, and none beyond`, () => {
    const described = read(saved)
    const tensors = new Map<string, TensorRef>()
    for (const [hfName, shape] of Object.entries(expected.tensors)) {
      const canonical = canonicalName(hfName, described.config.architecture) ?? ''
      const rest = { type: 'BF16', file: 0, offset: 0, byteLength: 0 } as const
      tensors.set(canonical, { name: canonical, shape: shape.toReversed(), ...rest })
    }
    checkWeights(described, tensors, 'golden')
    for (const missing of tensors.keys()) {
      const without = new Map(tensors)
      without.delete(missing)
      assert.throws(
        () => checkWeights(described, without, 'golden'),
        (thrown) => thrown instanceof LatticeError && thrown.message.includes(missing),
      )
    }
  })
}

test('a multimodal Gemma 3 is read by its text_config, silence being the class defaults', () => {
  const text = {
    model_type: 'gemma3_text',
    hidden_size: 2560,
    intermediate_size: 10_240,
    num_hidden_layers: 34,
    rope_scaling: { factor: 8, rope_type: 'linear' },
    sliding_window: 1024,
  }
  const { config, tiedOutput } = read({ model_type: 'gemma3', text_config: text })
  assert.deepEqual(
    [config.heads, config.kvHeads, config.headDim, config.vocab, config.contextLength],
    [8, 4, 256, 262_208, 131_072],
  )
  assert.deepEqual(config.rope, {
    base: 1_000_000,
    dimensions: 256,
    pairing: 'halves',
    scaling: { kind: 'linear', factor: 8 },
  })
  assert.equal(config.slidingWindow?.layers.filter((local) => !local).length, 5)
  assert.equal(config.attentionScale, 1 / 16)
  assert.equal(tiedOutput, 'yes')
  const name = 'language_model.model.layers.3.pre_feedforward_layernorm.weight'
  assert.equal(canonicalName(name, 'gemma3'), 'blk.3.ffn_norm.weight')
  assert.equal(canonicalName('model.vision_tower.x.weight', 'gemma3'), undefined)
})

test('what would change results is refused by name', () => {
  const base = goldens.find(({ name }) => name === 'llama')?.old ?? {}
  const gemma = goldens.find(({ name }) => name === 'gemma3')?.old ?? {}
  const refused: [Record<string, unknown>, RegExp][] = [
    [{ ...base, model_type: 'mamba2' }, /model_type "mamba2"/],
    [{ ...base, model_type: 'constructor' }, /model_type "constructor"/],
    [{ ...base, quantization_config: { bits: 4 } }, /quantization_config/],
    [{ ...base, num_local_experts: 8 }, /mixture of experts/],
    [{ ...base, hidden_act: 'gelu' }, /activation "gelu"/],
    [{ ...base, rope_scaling: { rope_type: 'dynamic', factor: 2 } }, /rope scaling "dynamic"/],
    [{ ...base, rope_scaling: { rope_type: 'longrope' } }, /rope scaling "longrope"/],
    [{ ...base, num_hidden_layers: 1e9 }, /num_hidden_layers is 1000000000/],
    [{ ...gemma, attn_logit_softcapping: 50 }, /attn_logit_softcapping/],
    [{ ...gemma, final_logit_softcapping: 30 }, /final_logit_softcapping/],
    [{ ...gemma, use_bidirectional_attention: true }, /not causal/],
    [{ ...gemma, layer_types: Array(7).fill('chunked_attention') }, /layer type "chunked_att/],
  ]
  for (const [json, message] of refused) {
    assert.throws(
      () => read(json),
      (thrown) => {
        assert.ok(
          thrown instanceof LatticeError && thrown.code === 'model_unsupported',
          String(thrown),
        )
        assert.match(thrown.message, message)
        return true
      },
    )
  }
})

test('keys of the wrong type are named', () => {
  const base = goldens.find(({ name }) => name === 'llama')?.old ?? {}
  for (const [key, value] of Object.entries({
    hidden_size: '16',
    rope_scaling: [1],
    head_dim: true,
  })) {
    assert.throws(
      () => read({ ...base, [key]: value }),
      (thrown) => thrown instanceof LatticeError && thrown.message.includes(key),
    )
  }
})
