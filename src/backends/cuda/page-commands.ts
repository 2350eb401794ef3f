// Owns carrying out what a pager is told: the driver's calls, and the handles of frames.

import { present } from '../../assert.ts'
import { LatticeError } from '../../errors.ts'
import type { CudaDriver, PageLocation } from '../../ffi/cuda.ts'

export class PageCommands {
  private readonly driver: CudaDriver
  private readonly device: number
  private readonly location: PageLocation
  private readonly handles: (number | undefined)[] = []
  /** Frames for which there was no memory, since the last look. */
  readonly absent: number[] = []
  /** Mapped in their place until whoever wanted them has heard of it. */
  private readonly sink: number
  private readonly sinkBytes: number
  /** Mapped, but not readable yet: one call for a whole run of neighbours costs a fifth less. */
  private runStart = 0
  private runEnd = 0

  /** @param sink as `createSink` makes it; released with `close` */
  constructor(driver: CudaDriver, device: number, sink: number) {
    this.driver = driver
    this.device = device
    this.location = { kind: 'device', device }
    this.sinkBytes = driver.pageBytes(this.location)
    this.sink = sink
  }

  create(frame: number, bytes: number): void {
    try {
      this.handles[frame] = this.driver.createPages(bytes, this.location)
    } catch (thrown) {
      if (!isOutOfMemory(thrown)) throw thrown
      this.standIn(frame)
      this.absent.push(frame)
    }
  }

  standIn(frame: number): void {
    this.handles[frame] = this.sink
  }

  release(frame: number): void {
    const handle = present(this.handles[frame], `frame ${frame}`)
    if (handle !== this.sink) this.driver.releasePages(handle)
    this.handles[frame] = undefined
  }

  map(address: number, bytes: number, frame: number): void {
    if (address !== this.runEnd) this.flush()
    const handle = present(this.handles[frame], `frame ${frame}`)
    const step = handle === this.sink ? this.sinkBytes : bytes
    for (let at = address; at < address + bytes; at += step) this.driver.map(at, step, handle)
    if (this.runStart === this.runEnd) this.runStart = address
    this.runEnd = address + bytes
  }

  unmap(address: number, bytes: number): void {
    this.flush()
    this.driver.unmap(address, bytes)
  }

  copyToHost(to: number, from: number, bytes: number, stream: number): void {
    this.flush()
    this.driver.copyToHost(to, from, bytes, stream)
  }

  copyToGpu(to: number, from: number, bytes: number, stream: number): void {
    this.flush()
    this.driver.copyToDevice(to, from, bytes, stream)
  }

  record(event: number, stream: number): void {
    this.driver.recordEvent(event, stream)
  }

  /** Lets the GPU use what was mapped. */
  flush(): void {
    const { runStart, runEnd } = this
    if (runStart === runEnd) return
    this.runStart = 0
    this.runEnd = 0
    this.driver.allow(runStart, runEnd - runStart, this.device)
  }

  close(): void {
    this.driver.releasePages(this.sink)
  }
}

/** The memory that stands in for memory that is refused: there before any can be. */
export function createSink(driver: CudaDriver, device: number): number {
  const location: PageLocation = { kind: 'device', device }
  return driver.createPages(driver.pageBytes(location), location)
}

function isOutOfMemory(thrown: unknown): boolean {
  return thrown instanceof LatticeError && thrown.details['code'] === 'CUDA_ERROR_OUT_OF_MEMORY'
}
