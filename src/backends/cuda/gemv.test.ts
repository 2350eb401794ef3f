// Catches a product of few tokens that no GPU launches: its blocks have more shared memory than
// there is without asking, and do not ask.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import {
  gemvAsks,
  gemvBlocks,
  GEMV_STATIC_BYTES,
  GEMV_TOKENS_MAX,
  gemvSharedBytes,
  gemvVariant,
} from './gemv.ts'
import { KERNELS_FOLDER } from './module-cache.ts'

/** Static and dynamic together, unless a launch asks for more. */
const SHARED_BYTES = 48 << 10
/** `scratch` of gemv.cu: floats of each token. */
const SCRATCH = 33
const K = [576, 896, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 8192, 12_288, 14_336]
/** Of vocabularies, and of what is within blocks. */
const ROWS = [32_000, 49_152, 128_256, 151_936, 152_064, 256_000, 262_144, 6144, 24_576, 28_672]
const MULTIPROCESSORS = [46, 58, 78, 84, 108, 114, 128, 132, 142, 144, 148, 160]

test('shared memory is not asked for', () => {
  const source = readFileSync(join(KERNELS_FOLDER, 'gemv.cu'), 'utf8')
  assert.deepEqual(source.match(/__shared__ (?!uint4 shared\[\])[^;]*/g), [
    `__shared__ float scratch[TOKENS][${SCRATCH}]`,
  ])
  assert.ok(GEMV_STATIC_BYTES >= GEMV_TOKENS_MAX * SCRATCH * 4)
  let made = 0
  for (const k of K) {
    for (const tokens of [1, 2, 4]) {
      for (const e4m3 of [false, true]) {
        const variant = gemvVariant(k, tokens, 'logits', true, e4m3)
        if (!variant) continue
        for (const rows of ROWS) {
          for (const multiprocessors of MULTIPROCESSORS) {
            const blocks = gemvBlocks(variant, rows, multiprocessors)
            const dynamic = gemvSharedBytes(variant, rows, blocks)
            const bytes = dynamic + tokens * SCRATCH * 4
            const what = `[${rows}, ${k}] × ${tokens} on ${multiprocessors}${e4m3 ? ', e4m3' : ''}`
            assert.ok(gemvAsks(dynamic) || bytes <= SHARED_BYTES, `${what}: ${bytes} bytes`)
            made++
          }
        }
      }
    }
  }
  assert.ok(made > 1000)
})
