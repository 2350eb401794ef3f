// Owns the way of log-probabilities from the GPU to the host: a ring beside that of tokens, which
// sample.cu fills for outputs whose sequence asks.

import type { TokenLogprobs } from '../../engine/api.ts'
import type { CudaDriver } from '../../ffi/cuda.ts'
import { viewMemory } from '../../ffi/libc.ts'
import { MAX_TOP_LOGPROBS } from '../../limits.ts'
import { PLACES } from './state.ts'

/** Of struct Report in logprobs.cuh: one, then tokens, then theirs. */
const WORDS = 1 + 2 * MAX_TOP_LOGPROBS

export class LogprobRing {
  /** [PLACES][outputs] reports, in host memory. */
  readonly address: number
  private readonly driver: CudaDriver
  private readonly outputs: number
  private readonly floats: Float32Array
  private readonly ids: Int32Array

  constructor(driver: CudaDriver, outputs: number) {
    this.driver = driver
    this.outputs = outputs
    const bytes = PLACES * outputs * WORDS * 4
    this.address = driver.allocateHost(bytes)
    const view = viewMemory(this.address, bytes)
    this.floats = new Float32Array(view)
    this.ids = new Int32Array(view)
  }

  /** Of a finished step's output, with `top` of the likeliest tokens; as `StepState.tokensOf`. */
  of(step: number, output: number, top: number): TokenLogprobs {
    const at = ((step % PLACES) * this.outputs + output) * WORDS
    const { floats, ids } = this
    const list = Array.from({ length: top }, (_, n) => ({
      token: ids[at + 1 + n] ?? 0,
      logprob: floats[at + 1 + MAX_TOP_LOGPROBS + n] ?? 0,
    }))
    return { logprob: floats[at] ?? 0, top: list }
  }

  close(): void {
    this.driver.freeHost(this.address)
  }
}
