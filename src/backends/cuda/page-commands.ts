// Owns carrying out what a pager is told: the driver's calls, and the handles of frames.

import { present } from '../../assert.ts'
import type { CudaDriver, PageLocation } from '../../ffi/cuda.ts'

export class PageCommands {
  private readonly driver: CudaDriver
  private readonly device: number
  private readonly location: PageLocation
  private readonly handles: (number | undefined)[] = []
  /** Mapped, but not readable yet: one call for a whole run of neighbours costs a fifth less. */
  private runStart = 0
  private runEnd = 0

  constructor(driver: CudaDriver, device: number) {
    this.driver = driver
    this.device = device
    this.location = { kind: 'device', device }
  }

  create(frame: number, bytes: number): void {
    this.handles[frame] = this.driver.createPages(bytes, this.location)
  }

  release(frame: number): void {
    this.driver.releasePages(present(this.handles[frame], `frame ${frame}`))
    this.handles[frame] = undefined
  }

  map(address: number, bytes: number, frame: number): void {
    if (address !== this.runEnd) this.flush()
    this.driver.map(address, bytes, present(this.handles[frame], `frame ${frame}`))
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
}
