// Catches a kernel that does not compile for a GPU that Lattice runs on.

import assert from 'node:assert/strict'
import { readdirSync } from 'node:fs'
import { test } from 'node:test'
import {
  type AttentionVariant,
  decodeVariant,
  hopperPrefillVariant,
  portablePrefillVariant,
} from '../src/backends/cuda/attention-variants.ts'
import { gemvVariant } from '../src/backends/cuda/gemv.ts'
import { KERNELS_FOLDER, ModuleCache } from '../src/backends/cuda/module-cache.ts'
import { provideNvrtc } from './support/nvrtc.ts'
import { temporaryDirectory } from './support/temporary.ts'

/** Bytes of shared memory that a block may have there. */
const ARCHITECTURES: Record<string, number> = {
  sm_80: 163 << 10,
  sm_90a: 227 << 10,
  sm_100: 227 << 10,
}

type Defines = Readonly<Record<string, number>>

const SHAPE = { heads: 32, kvHeads: 8, headDim: 128, scale: 1 }
const of = ({ defines }: AttentionVariant): Defines[] => [defines]

/** Kernels that are specialised for a shape, in shapes that differ much. */
const SPECIALISED: Record<string, (architecture: string, sharedBytes: number) => Defines[]> = {
  'gemv.cu': () =>
    [
      gemvVariant(4096, 1, 'rope', true),
      gemvVariant(4096, 2, 'glu', true),
      gemvVariant(14336, 1, 'add', false),
      gemvVariant(576, 4, 'logits', true),
      gemvVariant(64, 1, 'store', false),
    ].flatMap((variant) => variant?.defines ?? []),
  'attention-decode.cu': (_, room) => of(decodeVariant(SHAPE, room)),
  'attention-prefill.cu': (_, room) => of(portablePrefillVariant(SHAPE, room)),
  'attention-prefill-hopper.cu': (architecture) =>
    architecture === 'sm_90a' ? of(hopperPrefillVariant(SHAPE)) : [],
}

const skip = (await provideNvrtc()) ?? false

for (const file of readdirSync(KERNELS_FOLDER).filter((name) => name.endsWith('.cu'))) {
  test(`${file} does not compile`, { skip }, () => {
    const modules = new ModuleCache(temporaryDirectory('kernels'))
    for (const [architecture, room] of Object.entries(ARCHITECTURES)) {
      for (const defines of SPECIALISED[file]?.(architecture, room) ?? [{}]) {
        assert.ok(modules.get({ file, defines }, architecture).image.length > 0)
      }
    }
  })
}
