// Catches a mock that would let through what a real GPU driver punishes.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { MockCuda } from './mock-cuda.ts'

const PAGE = 4096
const DEVICE = { kind: 'device', device: 0 } as const

function mapped(): { cuda: MockCuda; address: number; handle: number; stream: number } {
  const cuda = new MockCuda({ pageBytes: PAGE, totalBytes: 16 * PAGE })
  const address = cuda.reserve(8 * PAGE)
  const handle = cuda.createPages(PAGE, DEVICE)
  cuda.map(address, PAGE, handle)
  cuda.allow(address, PAGE)
  return { cuda, address, handle, stream: cuda.createStream() }
}

test('a page can be mapped over another, or outside what is reserved', () => {
  const { cuda, address, handle } = mapped()
  assert.throws(() => cuda.map(address, PAGE, handle), /map over/)
  assert.throws(() => cuda.map(address + 8 * PAGE, PAGE, handle), /outside a reservation/)
})

test('a page can be unmapped or released under a kernel that reads it', () => {
  const { cuda, address, handle, stream } = mapped()
  const touches = [{ address: address + 10, bytes: 4 }]
  cuda.queue(stream, { name: 'step', touches, run: () => {} })
  assert.throws(() => cuda.unmap(address, PAGE), /step is still to use/)
  assert.throws(() => cuda.releasePages(handle), /1 mappings/)
  cuda.synchronizeStream(stream)
  cuda.unmap(address, PAGE)
  cuda.releasePages(handle)
  assert.throws(() => cuda.releasePages(handle), /released before/)
})

test('a kernel can read what nobody mapped or allowed', () => {
  const { cuda, address, stream } = mapped()
  const read = (at: number) => () =>
    cuda.queue(stream, { name: 'step', touches: [{ address: at, bytes: 8 }], run: () => {} })
  assert.throws(read(address + PAGE - 4), /illegal address/)
  cuda.map(address + PAGE, PAGE, cuda.createPages(PAGE, DEVICE))
  assert.throws(read(address + PAGE), /illegal address/)
  cuda.allow(address + PAGE, PAGE)
  read(address + PAGE - 4)()
})

test('two mappings of one page are two memories', () => {
  const { cuda, address, handle, stream } = mapped()
  cuda.map(address + 4 * PAGE, PAGE, handle)
  cuda.allow(address + 4 * PAGE, PAGE)
  cuda.fill8(address, 7, PAGE, stream)
  assert.equal(cuda.read(address + 4 * PAGE, 1)[0], 0xcd, 'nothing runs before it must')
  cuda.synchronizeStream(stream)
  assert.equal(cuda.read(address + 4 * PAGE, 1)[0], 7)
})

test('an event is reached before the work it was recorded after', () => {
  const { cuda, address, stream } = mapped()
  const other = cuda.createStream()
  const event = cuda.createEvent()
  assert.ok(cuda.eventDone(event))
  cuda.fill8(address, 1, 1, stream)
  cuda.recordEvent(event, stream)
  cuda.waitEvent(other, event)
  cuda.fill8(address, 2, 1, other)
  assert.equal(cuda.advance(other, 9), 0)
  assert.ok(!cuda.eventDone(event))
  cuda.synchronizeStream(other)
  assert.equal(cuda.read(address, 1)[0], 2)
})

test('what was not given back goes unnoticed, and so does taking more than there is', () => {
  const { cuda } = mapped()
  assert.throws(() => cuda.createPages(16 * PAGE, DEVICE), /OUT_OF_MEMORY/)
  assert.throws(() => cuda.assertClean(), /reservations 1, pages 1, mappings 1, streams 1/)
})
