// Owns the choice of tokens by a backend that has no GPU to choose them on: what a GPU's table of
// slots and its rings do, so that an engine can queue steps ahead of it.

import { assert, present } from '../../assert.ts'
import type { SamplingParams, TokenLogprobs } from '../../engine/api.ts'
import { Sampler, SamplerState } from '../../engine/sampler.ts'
import { LatticeError } from '../../errors.ts'
import type { SlotSampling, StepBatch, TokenChooser } from '../backend.ts'

/** What came of a step's outputs, in their order. */
interface Chosen {
  tokens: number[]
  logprobs: (TokenLogprobs | undefined)[]
}

/**
 * Computes a step and calls `choose` with the logits of each of its outputs, in order. What is done
 * to KV memory later happens after the step, so it computes at once.
 */
export type NullStep = (
  batch: StepBatch,
  choose: (slot: number, logits: Float32Array) => void,
) => void

/** Steps whose tokens may be asked for: two may be under way. */
const STEPS_KEPT = 2

export class NullChooser implements TokenChooser {
  /** By slot: the token that was chosen last. */
  readonly last: number[] = []
  private readonly compute: NullStep
  private readonly sampler: Sampler
  private readonly slots: ({ state: SamplerState; top: number | undefined } | undefined)[] = []
  private readonly steps = new Map<number, Chosen>()
  private launched = 0

  constructor(vocab: number, compute: NullStep) {
    this.sampler = new Sampler(vocab)
    this.compute = compute
  }

  takes(_params: SamplingParams, _topLogprobs?: number): boolean {
    return true
  }

  begin(slot: number, { params, prompt, output, topLogprobs }: SlotSampling): void {
    const state = new SamplerState(params, prompt)
    for (const token of output) {
      assert(token >= 0, 'what a sequence has generated is known when it begins')
      if (params.temperature > 0) state.random.uniform()
      state.accept(token)
    }
    this.slots[slot] = { state, top: topLogprobs }
  }

  launchChoosing(batch: StepBatch, _logits: boolean): number {
    const chosen: Chosen = { tokens: [], logprobs: [] }
    this.compute(batch, (slot, logits) => this.choose(slot, logits, chosen))
    this.steps.delete(this.launched - STEPS_KEPT)
    this.steps.set(this.launched, chosen)
    return this.launched++
  }

  /** A token of the batch, or the one that was chosen last for its slot. */
  known(slot: number, token: number): number {
    return token === -1 ? present(this.last[slot], 'a token that was chosen') : token
  }

  tokensOf(step: number): Int32Array {
    return Int32Array.from(present(this.steps.get(step), 'a step that is asked for in time').tokens)
  }

  logprobsOf(step: number, output: number, top: number): TokenLogprobs {
    const found = present(this.steps.get(step), 'a step that is asked for in time').logprobs[output]
    assert(found !== undefined && found.top.length <= top, 'whose sequence asked for them')
    return found
  }

  /** Who samples on the host has no state here: its token is nobody's. */
  private choose(slot: number, logits: Float32Array, { tokens, logprobs }: Chosen): void {
    const found = this.slots[slot]
    const token = found ? this.tokenOf(logits, found.state) : 0
    this.last[slot] = Math.max(0, token)
    tokens.push(token)
    const { top } = found ?? {}
    logprobs.push(
      top === undefined || token < 0 ? undefined : this.sampler.logprobs(logits, token, top),
    )
  }

  private tokenOf(logits: Float32Array, state: SamplerState): number {
    try {
      const token = this.sampler.sample(logits, state)
      state.accept(token)
      return token
    } catch (thrown) {
      if (thrown instanceof LatticeError) return -1
      throw thrown
    }
  }
}
