// Owns steps that are queued before the tokens of the one before them are known: a backend that
// chooses tokens itself always has the next step when one ends. A sequence goes on with a token
// that is not known yet; if it turns out to have ended with the last one, what was computed
// beyond that is dropped.
//
//   plan n+1, queue n+1 ──▶ take in n: tokens to whom they belong, who ends, ends ──▶ plan n+2 …

import { assert, present } from '../assert.ts'
import { LatticeError } from '../errors.ts'
import type { TokenLogprobs } from './api.ts'
import type { Backend, StepBatch, TokenChooser } from '../backends/backend.ts'
import type { StepWork } from '../scheduler/costs.ts'
import { isDecoding, type ScheduledPart } from '../scheduler/scheduler.ts'
import type { Sequence } from './sequence.ts'

/** A sequence of a step that wants a token, in the order of the step's outputs. */
export interface AwaitedToken {
  sequence: Sequence
  /** Of the token among the sequence's; -1 if it is to be chosen here, from logits. */
  position: number
}

/** A step that was queued. */
export interface Flight {
  number: number
  awaited: readonly AwaitedToken[]
  /** Logits of it are wanted here: the next step waits for it. */
  hosted: boolean
  work: StepWork
  /** When it could begin. */
  startMs: number
}

export class StepsAhead {
  /** The last step, until it was taken in. */
  flight: Flight | undefined
  private readonly backend: Backend
  private readonly chooser: TokenChooser
  /** What flights await, in turns: one is launched while the one before is not yet taken in. */
  private readonly awaited: readonly [AwaitedToken[], AwaitedToken[]] = [[], []]
  private turn: 0 | 1 = 0
  /** By slot: who chooses there now. */
  private readonly chosenFor: (Sequence | undefined)[] = []

  constructor(backend: Backend, chooser: TokenChooser) {
    this.backend = backend
    this.chooser = chooser
  }

  /** Queues a step of these parts, in the same order as the batch has them. */
  launch(parts: readonly ScheduledPart<Sequence>[], batch: StepBatch, nowMs: number): void {
    this.turn = this.turn === 0 ? 1 : 0
    const awaited = this.awaited[this.turn]
    let outputs = 0
    let anyHosted = false
    for (const { sequence, count } of parts) {
      const { slot, computed, tokens } = sequence
      // Who lost its slot computes its prompt first: by then its last token is known.
      const known = tokens[computed + count - 1] !== -1
      assert(known || this.chosenFor[slot] === sequence, 'a slot has chosen what comes next')
      if (computed + count < sequence.length) continue
      const hosted = this.isHosted(sequence)
      if (hosted) {
        anyHosted = true
        // The backend chooses something there, too, as if for who was there before.
        this.chosenFor[slot] = undefined
      } else this.begin(sequence)
      const position = hosted ? -1 : sequence.length
      const token = (awaited[outputs++] ??= { sequence, position })
      token.sequence = sequence
      token.position = position
    }
    awaited.length = outputs
    const number = this.chooser.launchChoosing(batch, anyHosted)
    const work = workOf(parts)
    this.flight = { awaited, hosted: anyHosted, work, number, startMs: nowMs }
  }

  /** The step that is under way, to be taken in when the next one is queued. */
  take(): Flight | undefined {
    const { flight } = this
    this.flight = undefined
    return flight
  }

  /**
   * Waits for a step, and writes its tokens where their sequences expect them.
   * @returns logits of all awaited tokens if the step is hosted
   */
  wait(flight: Flight): readonly Float32Array[] {
    const tokens = this.chooser.tokensOf(flight.number)
    let output = 0
    for (const { sequence, position } of flight.awaited) {
      const token = tokens[output++]
      if (position >= 0) sequence.tokens[position] = present(token, 'a token')
    }
    return flight.hosted ? this.backend.collect() : []
  }

  /** Log-probabilities of a step's output, if its sequence asks; once the step was waited for. */
  logprobsOf({ number }: Flight, output: number, { request }: Sequence): TokenLogprobs | undefined {
    const { topLogprobs } = request
    if (topLogprobs === undefined) return undefined
    return this.chooser.logprobsOf(number, output, topLogprobs)
  }

  /** Its tokens are chosen here: those of beams, or what is too much for the backend. */
  isHosted(sequence: Sequence): boolean {
    const { unit, request } = sequence
    return (sequence.hosted ??=
      unit !== undefined || !this.chooser.takes(request.sampling, request.topLogprobs))
  }

  private begin(sequence: Sequence): void {
    const { slot, request, tokens, promptLength, length } = sequence
    if (this.chosenFor[slot] === sequence) return
    // If it comes back to where it was, what is remembered there is old.
    const before = this.chosenFor.indexOf(sequence)
    if (before >= 0) this.chosenFor[before] = undefined
    this.chosenFor[slot] = sequence
    const output = tokens.subarray(promptLength, length)
    const { sampling: params, prompt, topLogprobs } = request
    this.chooser.begin(slot, { params, prompt, output, topLogprobs })
  }
}

/** What a step is about to compute. */
export function workOf(parts: readonly ScheduledPart<Sequence>[]): StepWork {
  const work = { promptTokens: 0, decodes: 0 }
  for (const { sequence, count } of parts) {
    if (isDecoding(sequence)) work.decodes++
    else work.promptTokens += count
  }
  return work
}

/** What a chosen token below 0 means. */
export function notANumber(): LatticeError {
  return new LatticeError('backend_failed', 'A logit is not a number.', {
    todo: 'Check the model file; `lattice inspect` reads it.',
  })
}
