// Owns the pager's own thread: takes commands out of the ring, in order. Entry point of a worker.

import { workerData } from 'node:worker_threads'
import { toLatticeError } from '../../errors.ts'
import { NativeCuda } from '../../ffi/cuda-native.ts'
import { PageCommands } from './page-commands.ts'
import { COMMAND, COMMAND_NUMBERS, type PagerThreadData, STATE } from './pager.ts'

/** Commands after which a waiting engine hears of them: a run of maps is allowed in one call. */
const BATCH = 16

const { ring, device, context, sink } = workerData as PagerThreadData
const { state, commands, error } = ring
const length = commands.length / COMMAND_NUMBERS

function fail(thrown: unknown): void {
  const json = Buffer.from(JSON.stringify(toLatticeError(thrown).toJSON())).subarray(
    0,
    error.length,
  )
  error.set(json)
  Atomics.store(state, STATE.errorBytes, json.length)
  Atomics.notify(state, STATE.done)
}

function carryOut(pages: PageCommands, index: number): void {
  const at = (((index % length) + length) % length) * COMMAND_NUMBERS
  const kind = commands[at]
  const address = commands[at + 1] ?? 0
  const bytes = commands[at + 2] ?? 0
  const frame = commands[at + 3] ?? 0
  const stream = commands[at + 4] ?? 0
  if (kind === COMMAND.create) pages.create(frame, bytes)
  else if (kind === COMMAND.release) pages.release(frame)
  else if (kind === COMMAND.map) pages.map(address, bytes, frame)
  else if (kind === COMMAND.unmap) pages.unmap(address, bytes)
  else if (kind === COMMAND.copyToHost) pages.copyToHost(address, frame, bytes, stream)
  else if (kind === COMMAND.copyToGpu) pages.copyToGpu(address, frame, bytes, stream)
  else if (kind === COMMAND.standIn) pages.standIn(frame)
  else pages.record(address, stream)
}

/** Returns when the pager is closed and nothing is left to do. */
function run(): void {
  const driver = new NativeCuda()
  driver.setContext(context)
  const pages = new PageCommands(driver, device, sink)
  for (let done = 0; ;) {
    const given = Atomics.load(state, STATE.given)
    if (given === done) {
      if (Atomics.load(state, STATE.closing) === 1) return pages.close()
      // Not for ever: the word to close may come between the look and the wait.
      Atomics.wait(state, STATE.given, given, 1000)
      continue
    }
    const count = Math.min((given - done) >>> 0, BATCH)
    for (let i = 0; i < count; i++) carryOut(pages, (done + i) >>> 0)
    pages.flush()
    for (const frame of pages.absent.splice(0)) {
      ring.absent[Atomics.load(state, STATE.absent) % ring.absent.length] = frame
      Atomics.add(state, STATE.absent, 1)
    }
    done = (done + count) | 0
    Atomics.store(state, STATE.done, done)
    Atomics.notify(state, STATE.done)
  }
}

try {
  run()
} catch (thrown) {
  fail(thrown)
}
