// Catches a kernel that does not compile for a GPU that Lattice runs on, or that nothing launches.

import assert from 'node:assert/strict'
import { readdirSync } from 'node:fs'
import { after, test } from 'node:test'
import { join } from 'node:path'
import { decodeVariant, prefillVariant } from '../src/backends/cuda/attention-variants.ts'
import { gemvVariant } from '../src/backends/cuda/gemv.ts'
import { KERNELS_FOLDER, type KernelSource, ModuleCache } from '../src/backends/cuda/module-cache.ts'
import { provideNvrtc } from './support/nvrtc.ts'
import { temporaryFolder } from './support/temporary.ts'

const ARCHITECTURES = ['sm_80', 'sm_90a', 'sm_100']

/** Kernels that are specialised for a shape, each in the shapes that differ most. */
const SPECIALISED: Record<string, () => Readonly<Record<string, number>>[]> = {
  'gemv.cu': () =>
    (['store', 'add', 'glu', 'logits', 'rope'] as const).flatMap((epilogue) =>
      [
        gemvVariant(4096, 1, epilogue, true),
        gemvVariant(14336, 1, epilogue, false),
        gemvVariant(576, 4, epilogue, true),
      ].flatMap((variant) => variant?.defines ?? []),
    ),
}

const skip = (await provideNvrtc()) ?? false
const files = readdirSync(KERNELS_FOLDER).filter((file) => file.endsWith('.cu'))

for (const file of files) {
  test(`${file} does not compile`, { skip }, (t) => {
    const modules = new ModuleCache(temporaryFolder(t))
    for (const architecture of ARCHITECTURES) {
      for (const source of sourcesOf(file, architecture)) {
        assert.ok(modules.get(source, architecture).image.length > 0)
      }
    }
  })
}
