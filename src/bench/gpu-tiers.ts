// Owns the tiers part of `lattice bench gpu`: how fast KV goes to memory of the host and back,
// whether a prompt is reloaded sooner than computed, what reading it where it lies would cost, and
// what decoding sequences notice of all that.

import { present } from '../assert.ts'
import { gpuKvLayout } from '../backends/cuda/kv-layout.ts'
import { CudaKvMemory } from '../backends/cuda/kv-memory.ts'
import { HostTier } from '../backends/cuda/host-tier.ts'
import { openCuda, type OpenedCuda } from '../backends/cuda/open.ts'
import { GREEDY, type SequenceRequest } from '../engine/api.ts'
import { EngineCore } from '../engine/core.ts'
import type { KvTier } from '../kv/tier.ts'
import { dummyModel } from '../model/dummy.ts'
import { inPlace } from './gpu-in-place.ts'
import { type GpuBench, gpuMs, median, microseconds, quantile } from './gpu-measure.ts'

const MODEL = 'dummy:llama-3.1-8b'
const GIB = 2 ** 30
const PAGE = 2 << 20
/** 8,192 tokens of the model. */
const COLUMNS = GIB / PAGE
const PREFIX_TOKENS = 8192
const TAIL_TOKENS = 16
const HOST_BYTES = 4 * GIB
/** What the engine may use; the rest is moved back and forth beside it. */
const ENGINE_PAGES = (12 * GIB) / PAGE
const MOVED_PAGES = 2 * COLUMNS

const clock = new Int32Array(new SharedArrayBuffer(4))

/** The part `tiers` of `lattice bench gpu`. */
export function benchTiers(bench: GpuBench): void {
  const plain = plainCopies(bench)
  moves(bench, plain)
  inPlace(bench, PREFIX_TOKENS, GIB)
  const gpu = openCuda(dummyModel(MODEL), {
    device: bench.device.info.index,
    contextLength: PREFIX_TOKENS + 256,
    maxSequences: 32,
    stepTokens: 2048,
    kvBytes: (ENGINE_PAGES + MOVED_PAGES) * PAGE,
    kvIdleReleaseMs: Infinity,
    kvHostBytes: HOST_BYTES,
  })
  try {
    bench.row('memory of the host, pinned', (gpu.hostTier?.pinnedMs ?? 0) / 4, 'ms/GiB')
    const from = client(gpu)
    reloads(bench, from)
    for (const sequences of [16, 32]) beside(bench, gpu, from, sequences)
  } finally {
    gpu.close()
  }
}

/** One copy of a GiB each way: what the bus gives. */
function plainCopies(bench: GpuBench): Record<'save' | 'load', number> {
  const { driver } = bench.device
  const pinned = driver.allocateHost(GIB)
  const memory = driver.allocate(GIB)
  const rate = (queue: () => void): number => GIB / gpuMs(bench, 9, queue) / 1e6
  const save = rate(() => driver.copyToHost(pinned, memory, GIB, bench.stream))
  const load = rate(() => driver.copyToDevice(memory, pinned, GIB, bench.stream))
  driver.free(memory)
  driver.freeHost(pinned)
  return { save, load }
}

/** Columns of one sequence, through the tier, from the wish until they are there. */
function moves({ device, pager, row, stream }: GpuBench, plain: Record<'save' | 'load', number>) {
  const layout = gpuKvLayout(dummyModel(MODEL).config, PREFIX_TOKENS)
  const kv = new CudaKvMemory(device, layout, pager(), {
    ...{ slots: 4, regions: 4, limitPages: 2 * COLUMNS },
  })
  const tier = new HostTier(device, kv, { frames: COLUMNS })
  kv.tier = tier
  try {
    const columns = { region: 0, first: 0, end: COLUMNS }
    const places = Uint32Array.from({ length: COLUMNS }, (_, i) => i)
    kv.grow(0, 0, COLUMNS)
    kv.beforeStep(stream)
    kv.afterStep(stream)
    const took = { save: [] as number[], load: [] as number[] }
    for (let i = 0; i < 20; i++) {
      took.save.push(microseconds(() => finish(tier, () => tier.save(columns, places))) / 1e3)
      took.load.push(microseconds(() => finish(tier, () => tier.load(columns, places))) / 1e3)
      for (const place of places) tier.forget(place)
    }
    const rate = (ms: readonly number[]): number => GIB / median(ms) / 1e6
    row('1 GiB of KV to the host, in 512 pages', rate(took.save), 'GB/s', plain.save, 'one copy')
    row('1 GiB of KV to the GPU, in 512 pages', rate(took.load), 'GB/s', plain.load, 'one copy')
    // The first time: its pages are created and mapped before anything comes.
    const fresh = { region: 1, first: 0, end: COLUMNS }
    finish(tier, () => tier.save(columns, places))
    const ms = microseconds(() => {
      kv.grow(1, 0, COLUMNS)
      finish(tier, () => tier.load(fresh, places))
    })
    row(
      'the same into pages that are mapped for it',
      GIB / ms / 1e3,
      'GB/s',
      plain.load,
      'one copy',
    )
  } finally {
    kv.close()
  }
}

/** Polls until a ticket has ended. */
function finish(tier: KvTier, begin: () => number): void {
  const ticket = begin()
  while (!tier.poll().some((ended) => ended.ticket === ticket));
  tier.check()
}

interface Client {
  core: EngineCore
  /** By id: when its first token came. */
  first: Map<number, number>
  finished: Set<number>
}

function client({ backend }: OpenedCuda): Client {
  const first = new Map<number, number>()
  const finished = new Set<number>()
  const sink = {
    onStart() {},
    onToken: (id: number) => void (first.has(id) || first.set(id, performance.now())),
    onFinish: (id: number) => void finished.add(id),
  }
  const options = { maxSequences: 32, kvPages: ENGINE_PAGES, prefixPages: 10 * COLUMNS }
  const now = () => performance.now()
  return { core: new EngineCore(backend, options, sink, now), first, finished }
}

let nextId = 0

/** As the engine's thread does. */
function runUntil({ core }: Client, done: () => boolean): void {
  while (!done()) {
    if (core.step()) continue
    const wait = core.settle()
    if (wait !== undefined && wait > 0) Atomics.wait(clock, 0, 0, Math.min(1, wait))
  }
}

/** Milliseconds to the first token of a prompt that nothing else runs beside. */
function firstToken(from: Client, prompt: Int32Array): number {
  const id = nextId++
  const start = performance.now()
  from.core.submit(id, requestOf(prompt, 1))
  runUntil(from, () => from.finished.has(id))
  return present(from.first.get(id), 'a token') - start
}

/** A prompt of 8,192 cached tokens and 16 new ones: computed, reloaded, and there already. */
function reloads({ row }: GpuBench, from: Client): void {
  const { core } = from
  const prefix = (seed: number) => tokens(seed, PREFIX_TOKENS)
  const ask = (seed: number, tail: number) =>
    firstToken(from, Int32Array.from([...prefix(seed), ...tokens(1000 + tail, TAIL_TOKENS)]))
  ask(0, 0)
  const computed: number[] = []
  const there: number[] = []
  const reloaded: number[] = []
  const moved: number[] = []
  let tail = 1
  for (let i = 1; i <= 5; i++) {
    computed.push(ask(i, tail++))
    runUntil(from, movedOut(core))
    const before = core.snapshot().tier?.loadedBytes ?? 0
    reloaded.push(ask(i, tail++))
    moved.push((core.snapshot().tier?.loadedBytes ?? 0) - before)
    there.push(ask(i, tail++))
  }
  const name = `${MODEL}, 8,192 cached + 16 tokens`
  row(`${name}: first token, computed`, median(computed), 'ms')
  row(`${name}: first token, in GPU memory`, median(there), 'ms')
  row(`${name}: first token, reloaded`, median(reloaded), 'ms')
  row(`${name}: of it read from the host`, median(moved) / 2 ** 20, 'MiB')
  const recompute = median(computed) - median(there)
  const reload = median(reloaded) - median(there)
  row(`${name}: the prefix computed`, recompute, 'ms', reload, 'reloaded')
  row(`${name}: reloaded sooner by`, recompute / reload, 'times', 8, 'wanted')
  row(`${name}: first token sooner by`, median(computed) / median(reloaded), 'times')
}

/** Tells the session that was used last to leave the GPU; the answer says whether it has. */
function movedOut(core: EngineCore): () => boolean {
  const tenant = 'default'
  const [last] = core.answer({ kind: 'sessions', tenant })
  const id = present(last, 'a session').id
  return () => core.answer({ kind: 'offload', tenant, id }) === 'done'
}

/** Decoding sequences, quiet, and while a GiB goes out and another comes in all the time. */
function beside({ device, row }: GpuBench, gpu: OpenedCuda, from: Client, sequences: number): void {
  const kv = gpu.backend.kv as unknown as CudaKvMemory
  const tier = new HostTier(device, kv, { frames: COLUMNS })
  const region = kv.regions - 1
  kv.grow(region, 0, COLUMNS)
  const columns = { region, first: 0, end: COLUMNS }
  const places = Uint32Array.from({ length: COLUMNS }, (_, i) => i)
  const way = { save: 0, load: 0 }
  let moved = 0
  /** Goes out and comes in by turns; each is begun when the other has ended. */
  const keepMoving = (): void => {
    for (const { ticket } of tier.poll()) {
      moved += GIB
      if (ticket === way.save) way.load = tier.load(columns, places)
      else {
        for (const place of places) tier.forget(place)
        way.save = tier.save(columns, places)
      }
    }
  }
  const { core } = from
  const decode = (each: () => void): number[] => {
    const ids = Array.from({ length: sequences }, () => nextId++)
    for (const id of ids) core.submit(id, requestOf(tokens(id, 500), 400))
    runUntil(from, () => ids.every((id) => from.first.has(id)))
    for (let i = 0; i < 5; i++) core.step()
    const times: number[] = []
    let before = performance.now()
    while (ids.every((id) => !from.finished.has(id))) {
      core.step()
      each()
      const now = performance.now()
      times.push(now - before)
      before = now
    }
    runUntil(from, () => ids.every((id) => from.finished.has(id)))
    return times
  }
  decode(() => {})
  const quiet = decode(() => {})
  way.save = tier.save(columns, places)
  const start = performance.now()
  const busy = decode(keepMoving)
  const ms = performance.now() - start
  const name = `${MODEL}, ${sequences} decoding`
  row(`${name}: step p50 while KV moves`, median(busy), 'ms', median(quiet), 'quiet')
  row(
    `${name}: step p99 while KV moves`,
    quantile(busy, 0.99),
    'ms',
    quantile(quiet, 0.99),
    'quiet',
  )
  row(`${name}: KV moved meanwhile`, moved / ms / 1e6, 'GB/s')
  const end = way.load === 0 ? way.save : Math.max(way.save, way.load)
  while (!tier.poll().some(({ ticket }) => ticket === end));
  tier.close()
  kv.discard(region, 0, COLUMNS)
}

function tokens(seed: number, count: number): Int32Array {
  let random = seed * 7919 + 12345
  const next = (): number => (random = (Math.imul(random, 1103515245) + 12345) >>> 0) % 100_000
  return Int32Array.from({ length: count }, next)
}

function requestOf(prompt: Int32Array, maxTokens: number): SequenceRequest {
  return {
    requestId: 'bench',
    tenant: 'default',
    prompt,
    maxTokens,
    sampling: GREEDY,
    stopTokens: [],
    topLogprobs: undefined,
  }
}
