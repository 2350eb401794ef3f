// Owns the memory part of `lattice bench gpu`: what the driver's virtual memory costs, whether a
// step ever waits for it, and how fast pages move, fork and go back.

import { KernelLaunch } from '../ffi/kernel-launch.ts'
import { gpuKvLayout } from '../backends/cuda/kv-layout.ts'
import { CudaKvMemory } from '../backends/cuda/kv-memory.ts'
import { liveBytes, pagesFor } from '../kv/layout.ts'
import { RegionTable, regionsFor } from '../kv/regions.ts'
import { SlotTable } from '../kv/slots.ts'
import type { ModelConfig } from '../model/model.ts'
import { type GpuBench, gpuMs, median, microseconds, quantile } from './gpu-measure.ts'

/** The keys and values of Llama 3.1 8B: 128 KiB a token. */
const SHAPE = { layers: 32, kvHeads: 8, headDim: 128 } as ModelConfig
const CONTEXT = 16_384
const MIB = 2 ** 20
const PAGE = 2 * MIB
/** Less than a step of 256 sequences of that model takes: reading its weights alone is 5 ms. */
const STEP_NS = 8_000_000

interface Memory {
  kv: CudaKvMemory
  slots: SlotTable
}

export function benchMemory(bench: GpuBench): void {
  callCosts(bench)
  pageMoves(bench)
  withMemory(bench, 8192, (memory) => allocation(bench, memory))
  withMemory(bench, 4096, (memory) => forks(bench, memory))
  withMemory(bench, 8192, (memory) => waste(bench, memory))
  withMemory(bench, 8192, (memory) => stepTimes(bench, memory))
  withMemory(bench, 4096, (memory) => idleRelease(bench, memory))
}

function withMemory(bench: GpuBench, pages: number, use: (memory: Memory) => void): void {
  const layout = gpuKvLayout(SHAPE, CONTEXT, PAGE)
  const slots = 256
  const options = { slots, regions: regionsFor(slots), limitPages: pages, idleReleaseMs: 0 }
  const kv = new CudaKvMemory(bench.device, layout, bench.pager(), options)
  try {
    use({ kv, slots: new SlotTable(new RegionTable(layout, kv.regions, pages, kv), slots) })
  } finally {
    kv.close()
  }
}

/** Each call by itself, for one page and for a group of pages that is mapped as one. */
function callCosts({ device, row }: GpuBench): void {
  const { driver } = device
  const group = gpuKvLayout(SHAPE, CONTEXT, PAGE).shareColumns
  for (const pages of [1, group]) {
    const bytes = pages * PAGE
    const count = 64
    const base = driver.reserve(count * bytes)
    const times: Record<string, number[]> = {
      create: [],
      map: [],
      allow: [],
      unmap: [],
      release: [],
    }
    const timed = (name: string, call: () => void): void => {
      times[name]?.push(microseconds(call))
    }
    const handles: number[] = []
    for (let i = 0; i < count; i++) {
      const at = base + i * bytes
      timed('create', () => {
        handles.push(driver.createPages(bytes, { kind: 'device', device: device.info.index }))
      })
      timed('map', () => driver.map(at, bytes, handles[i] ?? 0))
      timed('allow', () => driver.allow(at, bytes, device.info.index))
    }
    for (let i = 0; i < count; i++) {
      timed('unmap', () => driver.unmap(base + i * bytes, bytes))
      timed('release', () => driver.releasePages(handles[i] ?? 0))
    }
    driver.freeReservation(base, count * bytes)
    for (const [name, values] of Object.entries(times)) {
      row(`${name} ${bytes / MIB} MiB`, median(values), 'us')
    }
  }
}

/** Pages to and from pinned memory, against one large copy: what PCIe gives. */
function pageMoves(bench: GpuBench): void {
  const { device, stream, row } = bench
  const { driver } = device
  const bytes = 512 * MIB
  const pinned = driver.allocateHost(bytes)
  const memory = driver.allocate(bytes)
  const rate = (queue: () => void): number => bytes / gpuMs(bench, 9, queue) / 1e6
  const directions = {
    'to host': (at: number, length: number) =>
      driver.copyToHost(pinned + at, memory + at, length, stream),
    'to GPU': (at: number, length: number) =>
      driver.copyToDevice(memory + at, pinned + at, length, stream),
  }
  for (const [name, move] of Object.entries(directions)) {
    const whole = rate(() => move(0, bytes))
    const group = gpuKvLayout(SHAPE, CONTEXT, PAGE).shareColumns * PAGE
    for (const piece of [PAGE, group]) {
      const pieces = rate(() => {
        for (let at = 0; at < bytes; at += piece) move(at, piece)
      })
      row(`${piece / MIB} MiB pages ${name}`, pieces, 'GB/s', whole, 'one large copy')
    }
  }
  driver.free(memory)
  driver.freeHost(pinned)
}

/** New memory by the pager, as prompts take it and as decoding does. */
function allocation({ stream, row }: GpuBench, { kv, slots }: Memory): void {
  const { pageBytes } = kv.layout.shape
  const ways: [name: string, chunk: number][] = [
    ['prompts of 4,096, chunks of 512', 512],
    ['decoding, a page at a time', 16],
  ]
  for (const [name, chunk] of ways) {
    const taken: number[] = []
    const us = microseconds(() => {
      for (let i = 0; i < 12; i++) {
        const slot = slots.acquire(4096)
        taken.push(slot)
        for (let tokens = chunk; tokens <= 4096; tokens += chunk) slots.grow(slot, tokens)
      }
      kv.beforeStep(stream)
    })
    const pages = 12 * pagesFor(kv.layout, 4096)
    row(`new KV, ${name}`, (pages * pageBytes) / us / 1e3, 'GB/s', 30, 'wanted')
    kv.afterStep(stream)
    for (const slot of taken) slots.retire(slot, -Infinity)
    while (slots.reclaim(Infinity) >= 0);
    while (kv.settle(performance.now()) !== undefined);
  }
}

/** From the wish to fork until the child's first step could be queued. */
function forks({ stream, row }: GpuBench, { kv, slots }: Memory): void {
  for (const tokens of [4096, 4090]) {
    const parent = slots.acquire(tokens)
    for (let at = 512; at < tokens + 512; at += 512) slots.grow(parent, Math.min(at, tokens))
    kv.beforeStep(stream)
    const own: number[] = []
    const whole = Array.from({ length: 30 }, () => {
      let child = -1
      const us = microseconds(() => {
        const spans = slots.spansOf(parent, tokens)
        own.push(
          microseconds(() => {
            slots.pin(spans)
            child = slots.acquireShared(spans)
          }),
        )
        kv.beforeStep(stream)
      })
      kv.afterStep(stream)
      slots.retire(child, -Infinity)
      // The next fork comes at a later step.
      kv.fence.wait(kv.fence.queued)
      kv.afterStep(stream)
      kv.drain()
      return us
    })
    slots.retire(parent, -Infinity)
    while (slots.reclaim(Infinity) >= 0);
    row(`fork of ${tokens} tokens, until it can run`, median(whole) / 1e3, 'ms', 1, 'wanted')
    row(`fork of ${tokens} tokens, on the engine's thread`, median(own) / 1e3, 'ms')
  }
}

/** 128 sequences of mixed lengths: what is resident beyond their tokens. */
function waste({ stream, row }: GpuBench, { kv, slots }: Memory): void {
  let live = 0
  let seed = 1
  for (let i = 0; i < 128; i++) {
    seed = (seed * 48271) % 2147483647
    const prompt = 64 + (seed % 1400)
    const slot = slots.acquire(prompt)
    for (let at = 512; at < prompt + 512; at += 512) slots.grow(slot, Math.min(at, prompt))
    const tokens = prompt + (seed % 300)
    for (let t = prompt; t <= tokens; t++) slots.grow(slot, t)
    live += liveBytes(kv.layout, tokens)
  }
  kv.beforeStep(stream)
  row('KV waste of 128 mixed sequences', (kv.residentBytes() / live - 1) * 100, '%', 2, 'wanted')
}

/** Steps of 8 ms while 256 sequences grow, against the same steps with everything mapped. */
function stepTimes(bench: GpuBench, { kv, slots }: Memory): void {
  const { device, modules, stream, row } = bench
  const { driver } = device
  const { image } = modules.get({ file: 'bench.cu' }, device.architecture)
  const module = driver.loadModule(image)
  const spin = new KernelLaunch(driver.functionOf(module, 'spin'), ['u64']).set(0, STEP_NS)
  const held = Array.from({ length: 256 }, () => slots.acquire(1))
  const steps = (): number[] => {
    // Each sequence enters a new page every 16 steps: 16 of them at each step.
    const lengths = held.map((_, i) => 1 + (i % 16))
    return Array.from({ length: 400 }, () => {
      const us = microseconds(() => {
        held.forEach((slot, i) => slots.grow(slot, lengths[i] ?? 0))
        kv.beforeStep(stream)
        driver.launch(spin, stream)
        kv.afterStep(stream)
        held.forEach((slot, i) => {
          lengths[i] = (lengths[i] ?? 0) + 1
          slots.expect(slot, lengths[i] ?? 0)
        })
        kv.fence.wait(kv.fence.queued)
      })
      return us / 1e3
    })
  }
  for (const slot of held) slots.grow(slot, 16)
  kv.beforeStep(stream)
  const { lateSteps } = kv.counters
  const growing = steps()
  const late = kv.counters.lateSteps - lateSteps
  // The same again: now every page is there.
  const mapped = steps()
  row('step p50, 256 sequences grow', median(growing), 'ms', median(mapped), 'all mapped')
  const [p99, reference] = [quantile(growing, 0.99), quantile(mapped, 0.99)]
  row('step p99, 256 sequences grow', p99, 'ms', reference, 'all mapped')
  row('steps of 400 that waited for a page', late, '')
  driver.unloadModule(module)
}

/** From the end of the last sequence until another process could have the memory. */
function idleRelease({ device, stream, row }: GpuBench, { kv, slots }: Memory): void {
  const before = device.driver.memoryInfo().freeBytes
  const held = Array.from({ length: 31 }, () => slots.acquire(2048))
  for (const slot of held) {
    for (let at = 512; at <= 2048; at += 512) slots.grow(slot, at)
  }
  kv.beforeStep(stream)
  kv.afterStep(stream)
  const bytes = before - device.driver.memoryInfo().freeBytes
  for (const slot of held) slots.retire(slot, -Infinity)
  const us = microseconds(() => {
    while (slots.reclaim(Infinity) >= 0);
    while (kv.settle(performance.now()) !== undefined);
    kv.drain()
  })
  row(`${(bytes / 2 ** 30).toFixed(1)} GiB given back`, us / 1e3, 'ms', 1000, 'wanted')
  const left = before - device.driver.memoryInfo().freeBytes
  row('of it not free after', left / MIB, 'MiB')
}
