// Owns the pager as the main thread sees it: started there, and watched there, because the engine's
// thread may be waiting in a page fault when the pager dies.

import { Worker } from 'node:worker_threads'
import { type LatticeError, toLatticeError } from '../errors.ts'
import { died, pagerState } from './last-rites.ts'
import type { PagerStart } from './pager.ts'
import { CLOSED, DEAD } from './shared.ts'
import { pagerFailed } from './tier.ts'

export class PagerHost {
  /** Why it has ended without having been asked to, once it has. */
  death: LatticeError | undefined
  /** Told then. */
  onDeath: (why: LatticeError) => void = () => {}
  private readonly worker: Worker
  private readonly exited: Promise<void>

  constructor(start: PagerStart) {
    this.worker = new Worker(new URL('./pager-thread.ts', import.meta.url), { workerData: start })
    let cause: LatticeError | undefined
    this.worker.on('error', (thrown) => (cause = toLatticeError(thrown)))
    this.exited = new Promise((resolve) => {
      this.worker.once('exit', () => {
        if (pagerState(start) !== CLOSED) {
          if (pagerState(start) !== DEAD) died(start)
          this.death = pagerFailed(cause)
          this.onDeath(this.death)
        }
        resolve()
      })
    })
  }

  /** Ends the thread on the spot, as a crash would; one that was closed has ended by itself. */
  async terminate(): Promise<void> {
    await this.worker.terminate()
    await this.exited
  }
}
