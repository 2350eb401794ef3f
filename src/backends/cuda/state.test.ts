// Catches a host that looks for ever at a GPU that does not go on, so that nobody learns of it.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { MockCuda } from '../../../test/support/mock-cuda.ts'
import { StepState } from './state.ts'

test('a step that never ends is waited for without an end', (t) => {
  const cuda = new MockCuda()
  const stream = cuda.createStream()
  const state = new StepState(cuda, { tokens: 8, outputs: 4, slots: 4 }, stream)
  let asked = 0
  const clock = t.mock.method(performance, 'now', () => asked * 20_000)
  cuda.streamDone = () => {
    asked++
    return false
  }
  assert.throws(() => state.wait(0), { code: 'backend_failed' })
  assert.equal(asked, 4, 'at 20, 40 and 60 s it is still waited for')
  clock.mock.restore()
  state.close()
})
