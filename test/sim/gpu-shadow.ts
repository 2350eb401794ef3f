// Owns the memory of a GPU that is told all that the simulated one is told: a mock of the driver
// throws where a page is unmapped, or handed on, that a step may still touch, and the account of
// frames is checked in every step. What lies in the pages, the simulated memory knows.

import { present } from '../../src/assert.ts'
import { CudaDevice } from '../../src/backends/cuda/device.ts'
import { CudaKvMemory } from '../../src/backends/cuda/kv-memory.ts'
import { InlinePager } from '../../src/backends/cuda/pager.ts'
import type { KvLayout } from '../../src/kv/layout.ts'
import type { KvColumns } from '../../src/kv/regions.ts'
import { MockCuda } from '../support/mock-cuda.ts'

export class GpuShadow {
  readonly kv: CudaKvMemory
  private readonly cuda: MockCuda
  private readonly device: CudaDevice
  private readonly stream: number
  /** Of what goes to the disk and comes back. */
  private readonly transfers: number
  /** By step, what tells its end, until somebody waited for it. */
  private readonly ends = new Map<number, number>()
  private steps = 0

  constructor(layout: KvLayout, slots: number, regions: number, limitPages: number) {
    const cuda = new MockCuda({ pageBytes: layout.shape.pageBytes })
    this.cuda = cuda
    this.device = CudaDevice.open(0, cuda)
    const pager = new InlinePager(this.device, limitPages % 2 === 0)
    const options = { slots, regions, limitPages, idleReleaseMs: 50 }
    this.kv = new CudaKvMemory(this.device, layout, pager, options)
    this.stream = cuda.createStream()
    this.transfers = cuda.createStream()
  }

  /** Queues a step that touches so many tokens of each of these slots. @returns its number */
  launch(touched: readonly { slot: number; tokens: number }[]): number {
    const { kv, cuda, stream } = this
    kv.check()
    kv.beforeStep(stream)
    const { tokenStride } = kv.layout
    const touches = touched.map(({ slot, tokens }) => {
      return { address: kv.slotAddress(slot), bytes: tokens * tokenStride }
    })
    cuda.queue(stream, { name: 'step', touches, run: () => {} })
    const end = cuda.createEvent()
    cuda.recordEvent(end, stream)
    this.ends.set(this.steps, end)
    kv.afterStep(stream)
    return this.steps++
  }

  wait(step: number): void {
    const end = present(this.ends.get(step), 'a step')
    this.cuda.synchronizeEvent(end)
    this.cuda.destroyEvent(end)
    this.ends.delete(step)
  }

  /** Columns go out or come back, until `endTransfers`. */
  transfer(kind: 'save' | 'load', columns: KvColumns): void {
    const { kv, cuda, transfers } = this
    if (kind === 'save') kv.beforeSave(columns, transfers)
    else kv.beforeLoad(columns, transfers)
    kv.drain()
    const { pageBytes } = kv.layout.shape
    const bytes = (columns.end - columns.first) * pageBytes
    const address = kv.columnAddress(columns.region, columns.first)
    cuda.queue(transfers, { name: kind, touches: [{ address, bytes }], run: () => {} })
  }

  endTransfers(): void {
    this.cuda.synchronizeStream(this.transfers)
  }

  /** Throws if anything is left behind. */
  close(): void {
    for (const step of [...this.ends.keys()]) this.wait(step)
    this.kv.close()
    this.cuda.destroyStream(this.stream)
    this.cuda.destroyStream(this.transfers)
    this.device.close()
    this.cuda.assertClean()
  }
}
