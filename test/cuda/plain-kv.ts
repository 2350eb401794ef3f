// Owns KV memory on a GPU that is simply there: every slot's pages are allocated at once, nothing
// is shared or given back. For tests and measurements of what reads it.

import type { GpuKv } from '../../src/backends/cuda/backend.ts'
import type { CudaDriver } from '../../src/ffi/cuda.ts'
import type { KvLayout } from '../../src/kv/layout.ts'

export class PlainKv implements GpuKv {
  readonly layout: KvLayout
  readonly slots: number
  readonly regions: number
  readonly address: number
  private readonly driver: CudaDriver

  constructor(driver: CudaDriver, layout: KvLayout, slots: number) {
    this.driver = driver
    this.layout = layout
    this.slots = slots
    this.regions = slots
    this.address = driver.allocate(layout.slotBytes * slots)
  }

  /** Fills all of it with a bf16's bits. */
  fill(bits: number, stream: number): void {
    this.driver.fill16(this.address, bits, (this.layout.slotBytes * this.slots) / 2, stream)
    this.driver.synchronizeStream(stream)
  }

  map(): void {
    throw new Error('nothing is shared here')
  }

  copy(): void {
    throw new Error('nothing is shared here')
  }

  discard(): void {}

  regionOf(slot: number): number {
    return slot
  }

  beforeStep(): void {}

  afterStep(): void {}

  residentBytes(): number {
    return this.layout.slotBytes * this.slots
  }

  close(): void {
    this.driver.free(this.address)
  }
}
