// Catches a step that waits for those before it, or asks the driver about them, because it is told
// when they are over.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { MockCuda } from '../../../test/support/mock-cuda.ts'
import { StepFence } from './fence.ts'

test('steps in flight are waited for, or each step asks', () => {
  const cuda = new MockCuda()
  const stream = cuda.createStream()
  const fence = new StepFence(cuda)
  let asked = 0
  const { synchronizeEvent } = cuda
  cuda.synchronizeEvent = (event) => {
    asked++
    synchronizeEvent.call(cuda, event)
  }
  let ran = 0
  for (let step = 0; step < 100; step++) {
    cuda.queue(stream, { name: 'step', touches: [], run: () => ran++ })
    fence.record(stream)
    // Three are in flight; the host knows of those before, as it has their tokens.
    if (step >= 3) cuda.advance(stream)
    assert.equal(ran, Math.max(0, step - 2), `step ${step} waits for no other`)
  }
  assert.ok(asked <= 25, `${asked} times`)
  assert.equal(fence.passed(97), true)
  assert.equal(fence.passed(98), false)
  fence.close()
  cuda.destroyStream(stream)
  cuda.assertClean()
})
