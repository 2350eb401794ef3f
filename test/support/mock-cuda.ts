// Owns a GPU driver without a GPU, for tests: memory has bytes, streams have order, and whatever a
// real driver would answer with corruption or a crash throws here at once.
//
// Nothing runs before it has to: queued work waits until somebody synchronises, or the test calls
// `advance`. So code that unmaps or reuses what a queued kernel still reads is always caught.

import type { CudaDriver, GpuDevice, TensorMapTiled } from '../../src/ffi/cuda.ts'
import type { KernelLaunch } from '../../src/ffi/kernel-launch.ts'
import { NativeBlock } from '../../src/ffi/block.ts'
import { viewMemory } from '../../src/ffi/libc.ts'
import { MockGpuMemory, type Range } from './mock-gpu-memory.ts'

/** Work on a stream: what memory of the device it touches, and what it does. */
export interface Work {
  name: string
  touches: readonly Range[]
  run: () => void
  /** Not before this is true. */
  ready?: () => boolean
}

interface Stream {
  queue: Work[]
  queued: number
  done: number
  captured: Work[] | undefined
}

const NODES_LIMIT = 1_000_000
/** Questions whether an event is done after which a piece of work is. */
const ASKED_A_WORK = 20

export class MockCuda extends MockGpuMemory implements CudaDriver {
  readonly version = 13000
  readonly path = 'mock'
  private readonly pinned = new Map<number, NativeBlock>()
  private readonly registered = new Set<number>()
  private readonly streams = new Map<number, Stream>()
  private readonly events = new Map<number, { stream: number; at: number } | undefined>()
  private readonly modules = new Map<number, Uint8Array>()
  private readonly kernels = new Map<number, string>()
  private readonly graphs = new Map<number, Work[]>()
  private contexts = 0
  private asked = 0

  /** What a kernel does, by its name; unknown ones may not be launched. */
  readonly behaviours = new Map<string, (launch: KernelLaunch) => Omit<Work, 'name'>>()

  /** Throws if anything was not given back. */
  assertClean(): void {
    const left = Object.entries({
      contexts: this.contexts,
      reservations: this.reservations.size,
      pages: this.physical.size,
      mappings: this.mappings.size,
      allocations: this.allocations.size,
      pinned: this.pinned.size + this.registered.size,
      streams: this.streams.size,
      events: this.events.size,
      modules: this.modules.size,
      graphs: this.graphs.size,
    }).filter(([, count]) => count > 0)
    if (left.length > 0) throw new Error(`leaked: ${left.map((l) => l.join(' ')).join(', ')}`)
  }

  /** Queues work of the test's own. */
  queue(stream: number, work: Work): void {
    const { captured, queue } = this.stream(stream)
    if (captured) return void captured.push(work)
    for (const range of work.touches) this.translate(range, `queued ${work.name}`)
    queue.push(work)
    this.stream(stream).queued++
  }

  /** Runs up to `count` works of a stream, as far as they are ready. @returns how many ran */
  advance(stream: number, count = 1): number {
    const of = this.stream(stream)
    let ran = 0
    for (let work = of.queue[0]; work && ran < count; work = of.queue[0]) {
      if (work.ready && !work.ready()) break
      for (const range of work.touches) this.translate(range, `running ${work.name}`)
      work.run()
      of.queue.shift()
      of.done++
      ran++
    }
    return ran
  }

  /** Runs a work of each stream that is picked: others' work goes on while the test does. */
  advanceSome(pick: () => boolean): void {
    for (const stream of this.streams.keys()) if (pick()) this.advance(stream)
  }

  devices(): GpuDevice[] {
    return [
      {
        index: 0,
        name: 'Mock GPU',
        uuid: 'GPU-0',
        memoryBytes: this.totalBytes,
        capability: 90,
        multiprocessors: 132,
        l2Bytes: 50 << 20,
        sharedBytesPerBlock: 227 << 10,
        virtualMemory: true,
        hostNumaNode: 0,
        hostPages: true,
      },
    ]
  }

  attribute(): number {
    return 0
  }

  retainContext(): number {
    this.contexts++
    return 1
  }

  releaseContext(): void {
    if (--this.contexts < 0) throw new Error('releaseContext without retainContext')
  }

  setContext(): void {}

  synchronize(): void {
    for (const stream of this.streams.keys()) this.synchronizeStream(stream)
  }

  createStream(): number {
    const stream = this.fresh()
    this.streams.set(stream, { queue: [], queued: 0, done: 0, captured: undefined })
    return stream
  }

  destroyStream(stream: number): void {
    this.synchronizeStream(stream)
    this.streams.delete(stream)
  }

  /** As the driver: a stream that is captured may not be waited for, and nothing allocated. */
  override allocate(bytes: number): number {
    const captured = [...this.streams.values()].some((stream) => stream.captured)
    if (captured) throw new Error('an allocation within a capture')
    return super.allocate(bytes)
  }

  synchronizeStream(stream: number): void {
    const of = this.stream(stream)
    if (of.captured) throw new Error('a wait within a capture')
    for (let i = 0; of.queue.length > 0; i++) {
      let ran = 0
      for (const other of this.streams.keys()) ran += this.advance(other, Infinity)
      if (ran === 0) throw new Error(`streams wait for each other: ${of.queue[0]?.name}`)
      if (i > NODES_LIMIT) throw new Error('a stream never ends')
    }
  }

  streamDone(stream: number): boolean {
    return this.stream(stream).queue.length === 0
  }

  waitEvent(stream: number, event: number): void {
    const recorded = this.events.get(event)
    if (!this.events.has(event)) throw new Error(`event ${event} does not exist`)
    if (!recorded) return
    const { stream: on, at } = recorded
    const ready = (): boolean => (this.streams.get(on)?.done ?? Infinity) >= at
    this.queue(stream, { name: 'waitEvent', touches: [], ready, run: () => {} })
  }

  createEvent(): number {
    const event = this.fresh()
    this.events.set(event, undefined)
    return event
  }

  destroyEvent(event: number): void {
    if (!this.events.delete(event)) throw new Error(`event ${event} does not exist`)
  }

  recordEvent(event: number, stream: number): void {
    if (!this.events.has(event)) throw new Error(`event ${event} does not exist`)
    this.events.set(event, { stream, at: this.stream(stream).queued })
  }

  eventDone(event: number): boolean {
    if (!this.events.has(event)) throw new Error(`event ${event} does not exist`)
    const recorded = this.events.get(event)
    if (!recorded) return true
    const { stream, at } = recorded
    if ((this.streams.get(stream)?.done ?? Infinity) >= at) return true
    // Whoever asks again and again sees that time passes.
    if (++this.asked % ASKED_A_WORK === 0 && this.advance(stream) === 0) {
      // It waits for another stream.
      this.advanceSome(() => true)
    }
    return false
  }

  synchronizeEvent(event: number): void {
    const recorded = this.events.get(event)
    if (recorded && !this.eventDone(event)) this.synchronizeStream(recorded.stream)
  }

  elapsedMs(): number {
    return 1
  }

  allocateHost(bytes: number): number {
    const block = new NativeBlock(bytes)
    this.pinned.set(block.address, block)
    return block.address
  }

  freeHost(address: number): void {
    if (!this.pinned.delete(address)) throw new Error(`freeHost of ${address}, not allocated`)
  }

  registerHost(address: number): void {
    if (this.registered.has(address)) throw new Error(`registerHost of ${address}, a second time`)
    this.registered.add(address)
  }

  unregisterHost(address: number): void {
    if (!this.registered.delete(address)) throw new Error(`unregisterHost of ${address}`)
  }

  copyToDevice(to: number, from: number, bytes: number, stream: number): void {
    const run = (): void => this.write(to, new Uint8Array(viewMemory(from, bytes)))
    this.queue(stream, { name: 'copyToDevice', touches: [{ address: to, bytes }], run })
  }

  copyToHost(to: number, from: number, bytes: number, stream: number): void {
    const run = (): void => new Uint8Array(viewMemory(to, bytes)).set(this.read(from, bytes))
    this.queue(stream, { name: 'copyToHost', touches: [{ address: from, bytes }], run })
  }

  copyOnDevice(to: number, from: number, bytes: number, stream: number): void {
    this.count('copyOnDevice')
    const touches = [
      { address: to, bytes },
      { address: from, bytes },
    ]
    const run = (): void => this.write(to, this.read(from, bytes))
    this.queue(stream, { name: 'copyOnDevice', touches, run })
  }

  fill8(address: number, value: number, bytes: number, stream: number): void {
    const run = (): void => this.write(address, new Uint8Array(bytes).fill(value))
    this.queue(stream, { name: 'fill', touches: [{ address, bytes }], run })
  }

  fill16(address: number, value: number, count: number, stream: number): void {
    const data = new Uint8Array(new Uint16Array(count).fill(value).buffer)
    const run = (): void => this.write(address, data)
    this.queue(stream, { name: 'fill', touches: [{ address, bytes: count * 2 }], run })
  }

  fill32(address: number, value: number, count: number, stream: number): void {
    const data = new Uint8Array(new Uint32Array(count).fill(value).buffer)
    const run = (): void => this.write(address, data)
    this.queue(stream, { name: 'fill', touches: [{ address, bytes: count * 4 }], run })
  }

  loadModule(image: Uint8Array): number {
    const module = this.fresh()
    this.modules.set(module, image)
    return module
  }

  unloadModule(module: number): void {
    if (!this.modules.delete(module)) throw new Error(`unloadModule of ${module}, not loaded`)
  }

  functionOf(module: number, name: string): number {
    if (!this.modules.has(module)) throw new Error(`module ${module} is not loaded`)
    const kernel = this.fresh()
    this.kernels.set(kernel, name)
    return kernel
  }

  functionAttribute(): number {
    return 0
  }

  setFunctionAttribute(): void {}

  blocksPerMultiprocessor(): number {
    return 1
  }

  launch(launch: KernelLaunch, stream: number): void {
    const name = this.kernels.get(launch.kernel)
    const behaviour = name === undefined ? undefined : this.behaviours.get(name)
    if (name === undefined || !behaviour) throw new Error(`kernel ${name} has no behaviour`)
    this.count(`launch ${name}`)
    this.queue(stream, { name, ...behaviour(launch) })
  }

  beginCapture(stream: number): void {
    const of = this.stream(stream)
    if (of.captured) throw new Error('a capture within a capture')
    of.captured = []
  }

  endCapture(stream: number): number {
    const of = this.stream(stream)
    if (!of.captured) throw new Error('endCapture without beginCapture')
    const graph = this.fresh()
    this.graphs.set(graph, of.captured)
    of.captured = undefined
    return graph
  }

  destroyGraph(graph: number): void {
    if (!this.graphs.delete(graph)) throw new Error(`graph ${graph} does not exist`)
  }

  isKernels(graph: number): boolean {
    return this.works(graph).every(({ name }) => !/^(fill|copy)/.test(name))
  }

  instantiate(graph: number): number {
    const executable = this.fresh()
    this.graphs.set(executable, this.works(graph))
    return executable
  }

  updateGraph(executable: number, graph: number): boolean {
    if (this.works(executable).length !== this.works(graph).length) return false
    this.graphs.set(executable, this.works(graph))
    return true
  }

  launchGraph(executable: number, stream: number): void {
    for (const work of this.works(executable)) this.queue(stream, work)
  }

  destroyExecutable(executable: number): void {
    this.destroyGraph(executable)
  }

  /** What kernels in JavaScript need of a map: where it begins, and bytes from row to row. */
  encodeTensorMap(into: number, { address, strides }: TensorMapTiled): void {
    new Float64Array(viewMemory(into, 16)).set([address, strides[0] ?? 0])
  }

  private works(graph: number): Work[] {
    const works = this.graphs.get(graph)
    if (!works) throw new Error(`graph ${graph} does not exist`)
    return works
  }

  private stream(stream: number): Stream {
    const found = this.streams.get(stream)
    if (!found) throw new Error(`stream ${stream} does not exist`)
    return found
  }

  /** Nothing that is still queued touches the range. */
  protected assertIdle({ address, bytes }: Range, what: string): void {
    for (const { queue } of this.streams.values()) {
      for (const { name, touches } of queue) {
        const hit = touches.find(
          (t) => t.address < address + bytes && t.address + t.bytes > address,
        )
        if (hit) throw new Error(`${what} of what ${name} is still to use`)
      }
    }
  }
}
