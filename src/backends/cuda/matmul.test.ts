// Catches products that are computed at the same time: they share one workspace, in which some of
// the matrix library's kernels count tiles and add up parts.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { MockCuda } from '../../../test/support/mock-cuda.ts'
import { temporaryDirectory } from '../../../test/support/temporary.ts'
import type { CublasLt } from '../../ffi/cublaslt.ts'
import { CudaDevice } from './device.ts'
import { Matmuls, type Product } from './matmul.ts'

const ROWS = [1, 16, 64, 96]
const PRODUCTS: Product[] = [256, 1024].map((m) => ({
  ...{ m, k: 64, stride: m, float32: false, accumulate: false },
}))

/** A library whose products last until somebody waits for them. */
function libraryOf(cuda: MockCuda, running: Set<number>): CublasLt {
  let queued = 0
  return {
    version: 1,
    createHandle: () => 1,
    destroyHandle() {},
    plan: () => ({}),
    destroyPlan() {},
    algorithm: () => ({}),
    algorithms: () => [1, 2, 3].map((i) => ({ block: { bytes: Buffer.of(i) }, workspaceBytes: 4 })),
    matmul(_handle: number, _plan: object, _algorithm: object, ...rest: number[]) {
      const stream = rest[4]!
      const others = [...running].filter((one) => one !== stream)
      assert.deepEqual(others, [], `product ${queued} begins while streams still multiply`)
      queued++
      cuda.queue(stream, { name: 'product', touches: [], run: () => running.delete(stream) })
      // One that was captured does not run.
      if (!cuda.streamDone(stream)) running.add(stream)
    },
  } as unknown as CublasLt
}

test('shapes that are known are multiplied while others are, or are measured', () => {
  const cuda = new MockCuda()
  const device = CudaDevice.open(0, cuda)
  const folder = temporaryDirectory('products')
  // The driver's returns at once: what was queued goes on.
  const { destroyStream } = cuda
  const running = new Set<number>()
  cuda.destroyStream = (stream) => {
    if (!running.has(stream)) destroyStream.call(cuda, stream)
  }
  for (const rows of [ROWS.slice(0, 2), ROWS]) {
    const matmuls = new Matmuls(cuda, libraryOf(cuda, running), device.info, folder)
    for (const product of PRODUCTS) {
      for (const count of rows) matmuls.tune(product, count, [1 << 20], 2 << 20, 3 << 20)
    }
    matmuls.save()
    matmuls.close()
  }
})
