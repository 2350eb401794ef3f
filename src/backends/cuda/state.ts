// Owns what a step works on: the ring through which the host tells the GPU its rows, the device
// arrays that kernels read, and the ring through which tokens come back. A step is queued without
// any copy or wait; how far the GPU has come is a number in host memory.

import { assert } from '../../assert.ts'
import { LatticeError } from '../../errors.ts'
import type { CudaDriver } from '../../ffi/cuda.ts'
import { viewMemory } from '../../ffi/libc.ts'

/** Steps that may be queued and not yet collected, at most, is one less. */
export const PLACES = 4

/** int32 words of a row as step.cu's Entry has them. */
const WORDS = 5

/** Device arrays of one kind of rows: all tokens of a step, or its outputs. */
export interface RowArrays {
  /** [rows] int32 */
  positions: number
  /** [rows] u64: first byte of the row's region, 0 for rows that pad */
  bases: number
  /** [rows] int32: where the KV of the row's slot lies, 0 for rows that pad */
  regions: number
  /** [rows] int32: tokens that the row sees, itself included; 0 for rows that pad */
  lengths: number
}

export interface SegmentArrays {
  firstRows: number
  starts: number
  counts: number
  regions: number
}

export interface StepLimits {
  tokens: number
  outputs: number
  slots: number
}

export class StepState {
  readonly tokens: number
  readonly rows: Readonly<Record<'tokens' | 'outputs', RowArrays>>
  /** [outputs] int32: which row each output is; whose slot, -1 for rows that pad. */
  readonly outputRows: number
  readonly outputSlots: number
  readonly segments: SegmentArrays
  /** [outputs] int32: sampled tokens; by slot, the last one. */
  readonly sampled: number
  readonly lastTokens: number
  /** step.cu's Progress, on the device, and what the host sees of it. */
  readonly counter: number
  readonly inputRing: number
  readonly outputRing: number
  readonly done: number
  readonly entriesOfPlace: number
  readonly limits: StepLimits
  private readonly driver: CudaDriver
  readonly stream: number
  private readonly device: number
  private readonly host: number
  private readonly input: Int32Array
  private readonly output: Int32Array
  private readonly doneWords: Int32Array
  private queued = 0
  /** Spent in `wait`, in all. */
  waitedMs = 0

  /** @param stream that steps are queued on */
  constructor(driver: CudaDriver, limits: StepLimits, stream: number) {
    this.driver = driver
    this.stream = stream
    this.limits = limits
    const { tokens, outputs, slots } = limits
    let bytes = 0
    const array = (count: number, size = 4) => {
      const at = bytes
      bytes += Math.ceil((count * size) / 256) * 256
      return at
    }
    const arrays = (count: number): RowArrays => ({
      positions: array(count),
      bases: array(count, 8),
      regions: array(count),
      lengths: array(count),
    })
    const at = {
      tokens: array(tokens),
      rows: { tokens: arrays(tokens), outputs: arrays(outputs) },
      outputRows: array(outputs),
      outputSlots: array(outputs),
      segments: {
        firstRows: array(slots),
        starts: array(slots),
        counts: array(slots),
        regions: array(slots),
      },
      sampled: array(outputs),
      lastTokens: array(slots),
      counter: array(3, 8),
    }
    this.device = driver.allocate(bytes)
    driver.fill8(this.device, 0, bytes, stream)
    driver.synchronizeStream(stream)
    const moved = <T extends object>(group: T): T =>
      Object.fromEntries(
        Object.entries(group).map(([name, offset]) => [name, this.device + (offset as number)]),
      ) as T
    this.tokens = this.device + at.tokens
    this.rows = { tokens: moved(at.rows.tokens), outputs: moved(at.rows.outputs) }
    this.outputRows = this.device + at.outputRows
    this.outputSlots = this.device + at.outputSlots
    this.segments = moved(at.segments)
    this.sampled = this.device + at.sampled
    this.lastTokens = this.device + at.lastTokens
    this.counter = this.device + at.counter

    // Segments follow the rows of a place, in the same units.
    this.entriesOfPlace = tokens + slots
    const inputBytes = PLACES * this.entriesOfPlace * WORDS * 4
    const outputBytes = PLACES * outputs * 4
    this.host = driver.allocateHost(inputBytes + outputBytes + 64)
    this.inputRing = this.host
    this.outputRing = this.host + inputBytes
    this.done = this.host + inputBytes + outputBytes
    const view = viewMemory(this.host, inputBytes + outputBytes + 64)
    this.input = new Int32Array(view, 0, inputBytes / 4)
    this.output = new Int32Array(view, inputBytes, outputBytes / 4)
    this.doneWords = new Int32Array(view, inputBytes + outputBytes, 4)
    this.doneWords.fill(0)
  }

  /** Steps that were begun. */
  get steps(): number {
    return this.queued
  }

  /** Row `i` of the next step; see step.cu's Entry. */
  setRow(
    i: number,
    token: number,
    position: number,
    slot: number,
    output: number,
    region: number,
  ): void {
    const at = this.place(i)
    this.input[at] = token
    this.input[at + 1] = position
    this.input[at + 2] = slot
    this.input[at + 3] = output
    this.input[at + 4] = region
  }

  setSegment(i: number, firstRow: number, start: number, count: number, region: number): void {
    const at = this.place(this.limits.tokens + i)
    this.input[at] = firstRow
    this.input[at + 1] = start
    this.input[at + 2] = count
    this.input[at + 4] = region
  }

  /** The next step's rows are complete: what comes after is the step after it. */
  begin(): void {
    this.queued++
    assert(this.queued - this.finished < PLACES, 'a place of the ring is free again')
  }

  /** Steps that the GPU has finished. */
  get finished(): number {
    // Of 64 bits the lower half: it begins again after weeks, but few steps are under way.
    return this.queued - ((this.queued - Atomics.load(this.doneWords, 0)) >>> 0)
  }

  /** Milliseconds that the GPU was between steps, since the first, as of the last finished one. */
  get idleMs(): number {
    const [, , low = 0, high = 0] = this.doneWords
    return ((low >>> 0) + high * 2 ** 32) / 1e6
  }

  /**
   * Waits for step `step` (the first is 0) by looking: the GPU writes as soon as it is done.
   * @throws LatticeError `backend_failed` if it is not within a minute; what a failed kernel left
   */
  wait(step: number): void {
    const start = performance.now()
    for (let looks = 1; this.finished <= step; looks++) {
      if (looks % LOOKS_PER_ASK !== 0) continue
      // A failed kernel never says that it is done; asking the driver throws its error.
      this.driver.streamDone(this.stream)
      if (performance.now() - start > STUCK_MS) throw stuck(step)
    }
    this.waitedMs += performance.now() - start
  }

  /** Tokens of a finished step's outputs, until PLACES − 1 more were begun. */
  tokensOf(step: number): Int32Array {
    const { outputs } = this.limits
    const at = (step % PLACES) * outputs
    return this.output.subarray(at, at + outputs)
  }

  close(): void {
    this.driver.free(this.device)
    this.driver.freeHost(this.host)
  }

  private place(entry: number): number {
    return ((this.queued % PLACES) * this.entriesOfPlace + entry) * WORDS
  }
}

const LOOKS_PER_ASK = 1 << 20
/** The longest steps take some seconds: 8,192 tokens of a large model. */
const STUCK_MS = 60_000

function stuck(step: number): LatticeError {
  return new LatticeError('backend_failed', `The GPU has not finished step ${step} for a minute.`, {
    todo: 'Restart. If it comes back, report it with what `lattice inspect gpu` prints.',
  })
}
