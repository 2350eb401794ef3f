// Owns copies of a column that two sequences share in part: they wait until the next step is
// queued, so that nobody waits for the pages that they go to.

import type { CudaDriver } from '../../ffi/cuda.ts'

interface Copy {
  to: number
  from: number
  bytes: number
}

export class BoundaryCopies {
  /** Copies that were queued. */
  count = 0
  private readonly driver: CudaDriver
  private waiting: Copy[] = []

  constructor(driver: CudaDriver) {
    this.driver = driver
  }

  add(to: number, from: number, bytes: number): void {
    this.waiting.push({ to, from, bytes })
  }

  /** Queues all of them; the pages of both sides have to be there. */
  queue(stream: number): void {
    for (const { to, from, bytes } of this.waiting) {
      this.driver.copyOnDevice(to, from, bytes, stream)
    }
    this.count += this.waiting.length
    this.waiting.length = 0
  }

  /** Addresses [from, to) go: nobody needs what was to be copied there. */
  drop(from: number, to: number): void {
    if (this.waiting.length === 0) return
    this.waiting = this.waiting.filter((copy) => copy.to < from || copy.to >= to)
  }

  /** Whether one of them reads or writes addresses [from, to). */
  touch(from: number, to: number): boolean {
    const within = (at: number, bytes: number): boolean => at < to && at + bytes > from
    return this.waiting.some((copy) => within(copy.from, copy.bytes) || within(copy.to, copy.bytes))
  }
}
