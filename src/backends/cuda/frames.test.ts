// Catches an account of frames that is wrong after memory was refused.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { MockCuda } from '../../../test/support/mock-cuda.ts'
import { CudaDevice } from './device.ts'
import { StepFence } from './fence.ts'
import { FramePool } from './frames.ts'
import { InlinePager } from './pager.ts'

test('a number that two refused frames had, one after the other, counts twice', () => {
  const cuda = new MockCuda({ pageBytes: 4096, totalBytes: 64 * 4096 })
  const device = CudaDevice.open(0, cuda)
  const pager = new InlinePager(device)
  const fence = new StepFence(cuda)
  const shape = { pageBytes: 4096, groupColumns: 1, limitColumns: 8 }
  const pool = new FramePool(pager, fence, shape, () => {})
  cuda.refuses = () => true
  const first = pool.takeOne(true)!
  pool.destroyUsed(first)
  const second = pool.takeOne(true)!
  assert.equal(second.id, first.id)
  const heard = pager.takeAbsent().map((id) => pool.dropAbsent(id))
  assert.deepEqual(heard, [{ region: -1, first: -1, end: 0 }, undefined])
  assert.deepEqual([pool.columns, pool.absentColumns, pool.presentColumns], [1, 1, 0])
  pool.lapse(second)
  assert.deepEqual([pool.columns, pool.absentColumns, pool.residentBytes], [0, 0, 0])
  cuda.refuses = () => false
  pool.keepSpares(3)
  assert.equal(pool.presentColumns, 0, 'spares are beside the limit')
  pool.close()
  fence.close()
  pager.close()
  device.close()
  cuda.assertClean()
})
