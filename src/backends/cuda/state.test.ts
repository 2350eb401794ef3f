// Catches a host that looks for ever at a GPU that does not go on, so that nobody learns of it, or
// that takes one for stuck that has gone on for weeks.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { MockCuda } from '../../../test/support/mock-cuda.ts'
import { viewMemory } from '../../ffi/libc.ts'
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

for (const steps of [2 ** 31, 2 ** 32, 5 * 2 ** 32]) {
  test(`nothing runs after ${steps} steps`, () => {
    const cuda = new MockCuda()
    const state = new StepState(cuda, { tokens: 8, outputs: 4, slots: 4 }, cuda.createStream())
    cuda.streamDone = () => assert.fail('it is done')
    state['queued'] = steps - 2
    const done = new BigInt64Array(viewMemory(state.done, 8))
    for (let step = steps - 2; step < steps + 2; step++) {
      done[0] = BigInt(step)
      state.begin()
      assert.equal(state.finished, step)
      done[0] = BigInt(step + 1)
      state.wait(step)
    }
    state.close()
  })
}
