// Catches a kernel that a first request waits for, because nobody knew that it would be needed; and
// kernels that are compiled for nothing, not at all, or twice.

import assert from 'node:assert/strict'
import { readdirSync } from 'node:fs'
import { test } from 'node:test'
import { FAMILIES, Golden } from '../../../test/arch/golden.ts'
import { PlainKv } from '../../../test/cuda/plain-kv.ts'
import { MockCuda } from '../../../test/support/mock-cuda.ts'
import { MockKernels } from '../../../test/support/mock-kernels.ts'
import { provideNvrtc } from '../../../test/support/nvrtc.ts'
import { temporaryDirectory } from '../../../test/support/temporary.ts'
import { dummyModel } from '../../model/dummy.ts'
import type { Model } from '../../model/model.ts'
import { StepBatch } from '../backend.ts'
import { HEAD_DIMS } from './attention-variants.ts'
import { CudaBackend } from './backend.ts'
import { compileAhead } from './compile-ahead.ts'
import { CudaDevice } from './device.ts'
import { RELEASE_ROUNDS } from './forward.ts'
import { kernelsOf, keyOf } from './kernel-list.ts'
import { gpuKvLayout } from './kv-layout.ts'
import { type KernelSource, ModuleCache } from './module-cache.ts'
import { QUANTIZATIONS, type Quantization } from './quantization.ts'

const SLOTS = 8

/** What a backend asks for: while it starts, and in steps of all kinds afterwards. */
function askedFor(
  model: Model,
  quantization?: Quantization,
): { start: Set<string>; steps: Set<string> } {
  const cuda = new MockCuda({ pageBytes: 1 << 16, totalBytes: 2 ** 36 })
  const device = CudaDevice.open(0, cuda)
  const asked = { start: new Set<string>(), steps: new Set<string>() }
  let now = asked.start
  const modules = {
    folder: temporaryDirectory('products'),
    get(kernel: KernelSource) {
      now.add(keyOf(kernel))
      return { image: new Uint8Array(), log: undefined }
    },
  } as unknown as ModuleCache
  cuda.fill32 = () => {}
  cuda.behaviours.get = () => () => ({ touches: [], run: () => {} })
  const layout = gpuKvLayout(model.config, 64, 1 << 16)
  const { lt } = new MockKernels(cuda, model.config)
  lt.matmul = () => {}
  const backend = new CudaBackend(model, {
    device,
    modules,
    kv: new PlainKv(cuda, layout, SLOTS),
    maxSequences: SLOTS,
    stepTokens: 32,
    quantization,
    lt,
  })
  now = asked.steps
  const batch = new StepBatch(32, SLOTS)
  for (const counts of [[1], [2], [3], [4], [9], [1, 1], [1, 1, 1, 1], [1, 2], [1, 9], [1, 1, 7]]) {
    for (const wants of [true, false]) {
      batch.clear()
      counts.forEach((count, slot) => batch.add(slot, 0, new Int32Array(9), 0, count, wants))
      backend.launchChoosing(batch, false)
      cuda.synchronizeStream(backend.forward.stream)
      // Nothing ran that would have said so.
      const { state } = backend.forward
      Object.defineProperty(state, 'finished', { get: () => state.steps, configurable: true })
    }
  }
  backend.close()
  return asked
}

// Those of the goldens are so small that no product has a kernel of its own on Hopper.
const MODELS = new Map<string, Model>([
  ...FAMILIES.map((family) => [family, new Golden(family).model] as const),
  ['a 1B model', dummyModel('dummy:llama-3.2-1b')],
  ['an 8B model', dummyModel('dummy:llama-3.1-8b')],
])

for (const [name, model] of MODELS) {
  if (!HEAD_DIMS.includes(model.config.headDim)) continue
  for (const quantization of [undefined, ...QUANTIZATIONS]) {
    const how = quantization === undefined ? '' : `, as ${quantization}`
    test(`${name}${how}: a kernel is missing in the list, or needless`, () => {
      const device = CudaDevice.open(0, new MockCuda())
      const list = kernelsOf(model, device.info, RELEASE_ROUNDS, SLOTS, quantization).map(keyOf)
      const { start, steps } = askedFor(model, quantization)
      assert.deepEqual([...start].toSorted(), list.toSorted())
      assert.deepEqual([...steps], [], 'nothing is loaded after the start')
    })
  }
}

const skip = (await provideNvrtc()) ?? false

test('what is compiled at once is compiled again, or its errors stop the start', { skip }, () => {
  const modules = new ModuleCache(temporaryDirectory('kernels'))
  const kernels = ['embed.cu', 'glu.cu', 'rows.cu', 'norm.cu'].map((file) => ({
    file,
    defines: {},
  }))
  const broken = { file: 'glu.cu', defines: { bf16: 'struct' } }
  const said: number[] = []
  const compile = () =>
    compileAhead(modules, [broken, ...kernels], 'sm_90a', (count) => said.push(count))
  assert.equal(compile(), 5)
  assert.equal(readdirSync(modules.folder).length, 4)
  assert.ok(kernels.every((kernel) => modules.has(kernel, 'sm_90a')))
  assert.equal(compile(), 1, 'only what did not compile is tried again')
  assert.deepEqual(said, [5, 1])
  assert.throws(() => modules.get(broken, 'sm_90a'), { code: 'kernel_compile_failed' })
})

test('a folder that cannot be written to stops the start', { skip }, () => {
  const modules = new ModuleCache('/dev/null/kernels')
  assert.ok(modules.get({ file: 'glu.cu' }, 'sm_90a').image.length > 0)
  assert.match(modules.unkept ?? '', /ENOTDIR/)
})
