// The golden logits must notice: each setting that a family reads, each edge of a window and each
// stride of KV memory is made wrong on purpose, and the error has to leave rounding far behind.

import assert from 'node:assert/strict'
import { afterEach, describe, mock, test } from 'node:test'
import { FAMILIES, Golden } from './golden.ts'
import { Stepper } from './stepper.ts'
import { type AttentionPiece, AttentionPlan } from '../../src/backends/cpu/attention.ts'
import type { Model, ModelConfig, RopeConfig, TensorRef } from '../../src/model/model.ts'

/** What goes wrong, in the families where it means something. */
function mutants(model: Model): Record<string, Model> {
  const { config } = model
  const { rope, slidingWindow: window } = config
  const changed = (change: Partial<ModelConfig>) => ({ ...model, config: { ...config, ...change } })
  const found: Record<string, Model> = {
    'another rope base': changed({ rope: { ...rope, base: rope.base * 4 } }),
    'the other pairing of rope': changed({ rope: { ...rope, pairing: 'interleaved' } }),
    'half of each head rotated': changed({ rope: { ...rope, dimensions: config.headDim / 2 } }),
    'another attention scale': changed({ attentionScale: config.attentionScale * 1.1 }),
    'keys for values': swapped(model, 'blk.0.attn_k.weight', 'blk.0.attn_v.weight'),
    'gate for up': swapped(model, 'blk.0.ffn_gate.weight', 'blk.0.ffn_up.weight'),
    'one norm for the other': swapped(model, 'blk.0.attn_norm.weight', 'blk.0.ffn_norm.weight'),
  }
  for (const [name, scaling] of Object.entries(otherScalings(rope))) {
    found[name] = changed({ rope: { ...rope, scaling } })
  }
  if (window) {
    for (const more of [1, -1]) {
      const tokens = window.tokens + more
      found[`a window of ${more} more`] = changed({ slidingWindow: { ...window, tokens } })
    }
    const layers = window.layers.with(0, !window.layers[0])
    found['a global layer for a local one'] = changed({ slidingWindow: { ...window, layers } })
  }
  if (config.ropeLocal) {
    found['the global rope in local layers'] = changed({ ropeLocal: rope })
    found['unscaled embeddings'] = changed({ embeddingScale: 1 })
    found['norms without their one'] = { ...model, normWeightOffset: 0 }
  }
  if (config.normEps > 0.01) found['another epsilon'] = changed({ normEps: config.normEps * 1.5 })
  for (const name of model.tensors.keys()) {
    if (name.startsWith('blk.1.') && name.endsWith('.bias')) {
      found[`no ${name}`] = { ...model, tensors: without(model.tensors, name) }
    }
  }
  return found
}

function otherScalings({ scaling }: RopeConfig): Record<string, RopeConfig['scaling']> {
  if (scaling.kind === 'none') return {}
  const all: Record<string, RopeConfig['scaling']> = { 'unscaled rope': { kind: 'none' } }
  if (scaling.kind === 'linear') all['another rope factor'] = { kind: 'linear', factor: 6 }
  if (scaling.kind === 'factors') {
    const divisors = scaling.divisors.map((divisor) => (divisor > 1 && divisor < 8 ? 1 : divisor))
    all['no smooth step between rope factors'] = { kind: 'factors', divisors }
  }
  if (scaling.kind === 'yarn') {
    all['YaRN without its magnitude'] = { ...scaling, attentionFactor: 1 }
    all['YaRN with another fast end'] = { ...scaling, betaFast: 16 }
    all['YaRN with another slow end'] = { ...scaling, betaSlow: 2 }
    all['YaRN with another context'] = { ...scaling, originalContext: 1024 }
  }
  return all
}

function swapped(model: Model, a: string, b: string): Model {
  const [first, second] = [model.tensors.get(a), model.tensors.get(b)]
  assert.ok(first && second)
  const tensors = new Map(model.tensors).set(a, second).set(b, first)
  return { ...model, tensors }
}

function without(tensors: Model['tensors'], name: string): Map<string, TensorRef> {
  return new Map([...tensors].filter(([other]) => other !== name))
}

for (const family of FAMILIES) {
  const golden = new Golden(family)
  describe(`${family} with`, () => {
    for (const [name, model] of Object.entries(mutants(golden.model))) {
      test(name, () => {
        using stepper = new Stepper(golden, { model })
        stepper.hold(0, 1)
        const errors = stepper.run({ slot: 0, count: 46 }).map(({ error }) => error)
        while (stepper.left(0) > 0) errors.push(stepper.run({ slot: 0, count: 1 })[0]!.error)
        noticed(golden, errors)
      })
    }
  })
}

/** Wrong pieces of attention, as the graph would get them from a faulty plan. */
const PIECES: Record<string, (piece: AttentionPiece) => void> = {
  'a key too many': (piece) => void piece.kvTokens++,
  'a key too few': (piece) => void piece.kvTokens--,
  'keys from one position later': (piece) => void piece.kvStart++,
  'another slot stride': (piece) => void piece.slotStep++,
  'the next slot': (piece) => void piece.slot++,
  'the query of the token before': (piece) => void piece.firstToken--,
  'no mask': (piece) => void (piece.mask = -1),
  'the mask of the sequence after': (piece) => {
    if (piece.mask >= 0) piece.mask += piece.kvTokens
  },
}

describe('sequences that decode together with', () => {
  afterEach(() => mock.restoreAll())
  for (const [name, spoil] of Object.entries(PIECES)) {
    test(name, () => {
      const golden = new Golden('mistral')
      using stepper = new Stepper(golden)
      const slots = [1, 3, 5]
      slots.forEach((slot, i) => {
        stepper.hold(slot, 1)
        stepper.step({ slot, count: 30 + 3 * i })
      })
      const { plan } = AttentionPlan.prototype
      mock.method(AttentionPlan.prototype, 'plan', function (this: AttentionPlan, batch: never) {
        plan.call(this, batch)
        this.pieces.slice(0, this.count).forEach(spoil)
      })
      const parts = slots.map((slot) => ({ slot, count: 1 }))
      const errors = [1, 2, 3].flatMap(() => stepper.run(...parts).map(({ error }) => error))
      noticed(golden, errors)
    })
  }
})

/** NaN, from memory that nobody wrote, is as good as a large error. */
function noticed(golden: Golden, errors: readonly number[]): void {
  const largest = Math.max(...errors)
  const tolerance = golden.tolerance
  assert.ok(!(largest <= 2 * tolerance), `error ${largest} would pass as rounding (${tolerance})`)
}
