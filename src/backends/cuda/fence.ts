// Owns knowing which steps the GPU has finished: memory that a step in flight may still read or
// write is neither unmapped nor handed on.

import { present } from '../../assert.ts'
import type { CudaDriver } from '../../ffi/cuda.ts'

/** Twice as many as steps are in flight at once: two when the next is prepared early. */
const STEPS_IN_FLIGHT = 8

export class StepFence {
  /** Steps that were queued, and of them those that are finished. */
  queued = 0
  private finished = 0
  private readonly driver: CudaDriver
  private readonly events: readonly number[]

  constructor(driver: CudaDriver) {
    this.driver = driver
    this.events = Array.from({ length: STEPS_IN_FLIGHT }, () => driver.createEvent())
  }

  /** A step has been queued on the stream. */
  record(stream: number): void {
    // Once in a while for several steps: those were over long ago, and asking costs some µs.
    if (this.queued - this.finished >= STEPS_IN_FLIGHT) this.wait(this.queued - STEPS_IN_FLIGHT / 2)
    this.driver.recordEvent(this.event(this.queued), stream)
    this.queued++
  }

  /** Whether the first `steps` steps are finished. */
  passed(steps: number): boolean {
    while (this.finished < this.queued && this.driver.eventDone(this.event(this.finished))) {
      this.finished++
    }
    return this.finished >= steps
  }

  /** What is queued on another stream from now on comes after the first `steps` steps. */
  holdBack(stream: number, steps: number): void {
    if (!this.passed(steps)) this.driver.waitEvent(stream, this.event(steps - 1))
  }

  /** Returns when the first `steps` steps are finished. */
  wait(steps: number): void {
    if (steps > this.finished) this.driver.synchronizeEvent(this.event(steps - 1))
    this.finished = Math.max(this.finished, steps)
  }

  close(): void {
    this.wait(this.queued)
    for (const event of this.events) this.driver.destroyEvent(event)
  }

  private event(step: number): number {
    return present(this.events[step % STEPS_IN_FLIGHT], 'an event')
  }
}
