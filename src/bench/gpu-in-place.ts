// Owns measuring what it would cost to read KV where it lies, in memory of the host that is mapped
// into the GPU's addresses: against copying it first, for a short stay and for a long one.

import { Kernels } from '../backends/cuda/kernels.ts'
import { KernelLaunch } from '../ffi/kernel-launch.ts'
import { type GpuBench, gpuMs, median, microseconds } from './gpu-measure.ts'

/** As KV memory maps what is wanted at once (`KvLayout.shareColumns` of an 8B model). */
const PIECE = 32 << 20

/** Steps that a sequence runs before it goes again. */
const STAYS = [1, 2, 8, 64]

/** @param bytes of the KV of `tokens` tokens */
export function inPlace(bench: GpuBench, tokens: number, bytes: number): void {
  const { device, modules, row, stream } = bench
  const { driver, info } = device
  if (!info.hostPages) return
  const location = { kind: 'host', node: Math.max(0, info.hostNumaNode) } as const
  const pieces = bytes / PIECE
  const handles = Array.from({ length: pieces }, () => driver.createPages(PIECE, location))
  const address = driver.reserve(bytes)
  const mapMs: number[] = []
  const unmapMs: number[] = []
  const map = (): void => {
    for (const [i, handle] of handles.entries()) driver.map(address + i * PIECE, PIECE, handle)
    driver.allow(address, bytes, info.index)
  }
  const unmap = (): void => {
    for (let i = 0; i < pieces; i++) driver.unmap(address + i * PIECE, PIECE)
  }
  for (let i = 0; i < 7; i++) {
    mapMs.push(microseconds(map) / 1e3)
    unmapMs.push(microseconds(unmap) / 1e3)
  }
  map()
  const memory = driver.allocate(bytes)
  const pinned = driver.allocateHost(bytes)
  const kernels = new Kernels(device, modules)
  const read = new KernelLaunch(kernels.find('read.cu', 'readAll'), ['u64', 'u64', 'u64'])
  read.threads(512).grid(info.multiprocessors * 4)
  const readMs = (from: number): number => {
    read.setAll(from, bytes / 16, memory)
    return gpuMs(bench, 9, () => driver.launch(read, stream))
  }
  const there = readMs(memory)
  const here = readMs(address)
  const copy = gpuMs(bench, 9, () => driver.copyToDevice(memory, pinned, bytes, stream))
  const name = `KV of ${tokens} tokens`
  row(`${name} mapped where it lies`, median(mapMs), 'ms', copy, 'copied')
  row(`${name} unmapped again`, median(unmapMs), 'ms')
  row(`${name} read by a step where it lies`, here, 'ms', there, 'copied')
  for (const steps of STAYS) {
    const mapped = median(mapMs) + steps * here + median(unmapMs)
    row(`${name}, ${steps} steps where it lies`, mapped, 'ms', copy + steps * there, 'copied')
  }
  kernels.close()
  unmap()
  driver.freeReservation(address, bytes)
  for (const handle of handles) driver.releasePages(handle)
  driver.freeHost(pinned)
  driver.free(memory)
}
