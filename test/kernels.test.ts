// Catches a kernel that does not compile for a GPU that Lattice runs on.

import assert from 'node:assert/strict'
import { readdirSync } from 'node:fs'
import { test } from 'node:test'
import { attentionVariants } from '../src/backends/cuda/attention-variants.ts'
import { batchVariant } from '../src/backends/cuda/batch-plan.ts'
import { stepVariant } from '../src/backends/cuda/decode-step.ts'
import { gemvVariant } from '../src/backends/cuda/gemv.ts'
import { hopperVariants } from '../src/backends/cuda/hopper-products.ts'
import { KERNELS_FOLDER, ModuleCache } from '../src/backends/cuda/module-cache.ts'
import { provideNvrtc } from './support/nvrtc.ts'
import { temporaryDirectory } from './support/temporary.ts'

/** Compute capability, and bytes of shared memory that a block may have. */
const ARCHITECTURES: Record<string, readonly [capability: number, room: number]> = {
  sm_80: [80, 163 << 10],
  sm_90a: [90, 227 << 10],
  sm_100: [100, 227 << 10],
}

interface Shaped {
  file: string
  defines: Readonly<Record<string, number>>
}

/** Kernels that are specialised for a shape, in shapes that differ much. */
function shaped(capability: number, room: number): Shaped[] {
  const products = [
    gemvVariant(4096, 1, 'rope', true),
    gemvVariant(4096, 2, 'glu', true),
    gemvVariant(14336, 1, 'add', false),
    gemvVariant(576, 4, 'logits', true),
    gemvVariant(64, 1, 'store', false),
    gemvVariant(4096, 1, 'rope', true, true),
    gemvVariant(14336, 2, 'add', false, true),
    gemvVariant(576, 2, 'glu', true, true),
  ].flatMap((variant) => (variant ? [{ file: 'gemv.cu', defines: variant.defines }] : []))
  const attention = [64, 96, 128, 256].flatMap((headDim) =>
    Object.values(attentionVariants({ heads: 8, kvHeads: 2, headDim, scale: 1 }, capability, room)),
  )
  const fewTokens = [8, 64, 128].flatMap((tokens) =>
    hopperVariants(
      { rows: 4096, k: 4096, tokens, epilogue: 'add', headDim: 128 },
      132,
      capability === 90 ? room : 0,
    ).map(({ defines }) => ({ file: 'skinny-hopper.cu', defines })),
  )
  const skinny = new Map(fewTokens.map((one) => [JSON.stringify(one), one]))
  const heads = { heads: 32, kvHeads: 8 }
  const llama = {
    config: { ...heads, headDim: 128 },
    inputs: [4096, 14336],
    normed: [4096],
  }
  const small = { config: { heads: 9, kvHeads: 3, headDim: 96 }, inputs: [576], normed: [576] }
  const steps = [
    stepVariant(llama, 1, 108, room),
    stepVariant(llama, 4, 108, room),
    stepVariant(small, 1, 58, room),
  ].flatMap((variant) => ('reason' in variant ? [] : { file: 'decode-step.cu', ...variant }))
  const sharing = { groups: 256, steps: 64, tiles: 32, split: 4 }
  const batches = [64, 128].flatMap((headDim) =>
    [32, 64].flatMap((tokens) =>
      [false, true].map((e4m3) =>
        batchVariant({ e4m3, sharings: [sharing] }, { ...heads, headDim }, tokens, 132, room),
      ),
    ),
  )
  const manyTokens = batches.flatMap((variant) =>
    capability !== 90 || 'reason' in variant ? [] : { file: 'batch-step.cu', ...variant },
  )
  return [...products, ...attention, ...skinny.values(), ...steps, ...manyTokens]
}

const SHAPED = ['decode-step.cu', 'gemv.cu', 'attention-decode.cu', 'attention-prefill.cu']
const HOPPER_ONLY = ['attention-prefill-hopper.cu', 'batch-step.cu', 'skinny-hopper.cu']

const skip = (await provideNvrtc()) ?? false

for (const file of readdirSync(KERNELS_FOLDER).filter((name) => name.endsWith('.cu'))) {
  test(`${file} does not compile`, { skip }, () => {
    const modules = new ModuleCache(temporaryDirectory('kernels'))
    for (const [architecture, [capability, room]] of Object.entries(ARCHITECTURES)) {
      const variants = shaped(capability, room).filter((variant) => variant.file === file)
      const plain = [...SHAPED, ...HOPPER_ONLY].includes(file) ? [] : [{ file, defines: {} }]
      for (const { defines } of [...variants, ...plain]) {
        assert.ok(modules.get({ file, defines }, architecture).image.length > 0)
      }
    }
  })
}
