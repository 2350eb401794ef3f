// Catches logits that are not transformers', in every way a step runs on the GPU. KV memory is full
// of NaN before anything is written, so a key read too early, too late or elsewhere shows.

import assert from 'node:assert/strict'
import { after, describe, test } from 'node:test'
import { StepBatch } from '../../src/backends/backend.ts'
import { CudaBackend } from '../../src/backends/cuda/backend.ts'
import { gpuKvLayout } from '../../src/backends/cuda/kv-layout.ts'
import { FAMILIES, Golden } from '../arch/golden.ts'
import { Gpu, Random } from './gpu.ts'
import { PlainKv } from './plain-kv.ts'
import { ReferenceAttention } from './reference-attention.ts'

const gpu = new Gpu()
after(() => gpu[Symbol.dispose]())

/** bf16 everywhere; a wrong mask, angle or scale costs 0.05 and more. */
const TOLERANCE = 3e-2
const NAN_BF16 = 0x7fc0
const SLOTS = 9
const STEP_TOKENS = 704

interface Part {
  slot: number
  count: number
  wants?: boolean
}

const worst: Record<string, string> = {}
after(() => console.log('largest relative error:', worst))

/** Heads that the fast attention takes; every family also runs on the reference. */
const FAST = [64, 96, 128, 256]

/** The last: few decoding sequences in one kernel where a family allows it, else as the first. */
type Kind = 'reference attention' | 'own products' | 'fast attention' | 'whole steps'

for (const family of FAMILIES) {
  const golden = new Golden(family)
  run(family, golden, 'reference attention')
  run(family, golden, 'own products')
  run(family, golden, 'whole steps')
  if (FAST.includes(golden.model.config.headDim)) run(family, golden, 'fast attention')
}

function run(family: string, golden: Golden, kind: Kind): void {
  const name = `${family}, ${kind}`
  describe(name, () => {
    const longest = Math.max(...golden.sequences.map(({ tokens }) => tokens.length))
    const layout = gpuKvLayout(golden.model.config, longest + 3, 2 << 20)
    const kv = new PlainKv(gpu.driver, layout, SLOTS)
    kv.fill(NAN_BF16, gpu.stream)
    const backend = new CudaBackend(golden.model, {
      device: gpu.device,
      modules: gpu.modules,
      kv,
      tune: false,
      // These models are so small that the matrix library would be taken.
      hopperAlways: kind === 'own products',
      ...(kind === 'fast attention'
        ? {}
        : {
            attention: (state, find) =>
              new ReferenceAttention(gpu.driver, golden.model.config, layout, state, find),
          }),
      wholeSteps: kind === 'whole steps',
      maxSequences: SLOTS,
      stepTokens: STEP_TOKENS,
    })
    const batch = new StepBatch(STEP_TOKENS, SLOTS)
    const held = new Map<number, { sequence: number; length: number }>()
    let largest = 0
    after(() => {
      worst[name] = largest.toExponential(1)
      backend.close()
    })

    const hold = (slot: number, sequence: number) => held.set(slot, { sequence, length: 0 })
    const left = (slot: number) => {
      const { sequence, length } = held.get(slot)!
      return golden.sequence(sequence).tokens.length - length
    }
    const step = (...parts: Part[]) => {
      batch.clear()
      const wanted: { sequence: number; position: number }[] = []
      for (const { slot, count, wants = true } of parts) {
        const at = held.get(slot)!
        batch.add(slot, at.length, golden.sequence(at.sequence).tokens, at.length, count, wants)
        at.length += count
        if (wants) wanted.push({ sequence: at.sequence, position: at.length - 1 })
      }
      backend.launch(batch)
      const rows = backend.collect()
      wanted.forEach(({ sequence, position }, i) => {
        const error = golden.error(sequence, position, rows[i]!)
        if (!(error <= largest)) largest = error
        assert.ok(
          error <= TOLERANCE,
          `sequence ${sequence} at ${position}: relative error ${error}`,
        )
      })
    }

    test('wrong when a whole prompt is one step', () => {
      for (const sequence of [0, 1, 2]) {
        hold(sequence, sequence)
        step({ slot: sequence, count: left(sequence) })
      }
    })

    test('wrong when a prompt comes in odd chunks', () => {
      hold(3, 0)
      for (const count of [1, 7, 64, 3, 65, 2, 17]) step({ slot: 3, count })
      step({ slot: 3, count: left(3) })
    })

    for (const rows of [1, 2, 3, 4, 5, 8]) {
      test(`wrong when ${rows} sequences decode together`, () => {
        const slots = [6, 0, 1, 5, 2, 8, 3, 7].slice(0, rows)
        slots.forEach((slot, i) => {
          hold(slot, 1)
          step({ slot, count: [12, 33, 3, 19, 33, 1, 8, 20][i]! })
        })
        for (let i = 0; i < 8; i++) step(...slots.map((slot) => ({ slot, count: 1 })))
      })
    }

    test('wrong when chunks and single tokens share a step, with and without logits', () => {
      const random = new Random(21)
      for (let slot = 0; slot < 6; slot++) hold(slot, slot % 3)
      for (let i = 0; i < 25; i++) {
        const parts = [0, 1, 2, 3, 4, 5]
          .filter((slot) => left(slot) > 0 && random.next() < 0.8)
          .map((slot) => ({
            slot,
            count: Math.min(left(slot), random.next() < 0.4 ? 1 + random.below(40) : 1),
            wants: random.next() < 0.7,
          }))
        if (parts.length > 0) step(...parts)
      }
    })
  })
}
