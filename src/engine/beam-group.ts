// Owns one beam search as the engine runs it: which sequence is which beam, and how they fork from
// each other. A beam that has one successor stays where it is; of several, all but the first take
// over the slots of beams that have none.

import { present } from '../assert.ts'
import { LatticeError } from '../errors.ts'
import type { KvLayout } from '../kv/layout.ts'
import { columnsFor, shareableColumns } from '../kv/regions.ts'
import type { Scheduler, SchedulingUnit } from '../scheduler/scheduler.ts'
import type { BeamParams, SequenceRequest } from './api.ts'
import { BeamSearch, type Hypothesis } from './beams.ts'
import type { Sampler } from './sampler.ts'
import { Sequence } from './sequence.ts'

export class BeamGroup implements SchedulingUnit<Sequence> {
  /** Who waits for the hypotheses, in their order; undefined where nobody does any more. */
  readonly ids: (number | undefined)[]
  readonly width: number
  readonly pagesMost: number
  private readonly pagesAtFirst: number
  private readonly layout: KvLayout
  /** The running beams, the best first; before that the one sequence that computes the prompt. */
  members: Sequence[]
  /** It gave way once: what it shared with others then might be what it lacks. */
  restarted = false
  private readonly request: SequenceRequest
  private readonly params: BeamParams
  private search: BeamSearch
  private offers = 0

  /** @throws LatticeError `invalid_request` for what no beam search can be */
  constructor(ids: readonly number[], request: SequenceRequest, layout: KvLayout, nowMs: number) {
    this.params = checked(request, ids.length)
    this.ids = [...ids]
    this.request = request
    this.width = this.params.width
    this.layout = layout
    const { prompt, maxTokens } = request
    this.pagesMost = pagesOf(layout, prompt.length, maxTokens, this.width)
    this.pagesAtFirst = pagesOf(layout, prompt.length, 1, this.width)
    this.members = [this.sequence(nowMs)]
    this.search = this.begin()
  }

  /** Who had to give way comes back only when it need not do so a second time. */
  get pagesToEnter(): number {
    const { image } = this.lead
    if (!image) return this.restarted ? this.pagesMost : this.pagesAtFirst
    return this.pagesMost - image.parts.first * this.layout.ranges
  }

  /** Nobody waits for it any more. */
  get abandoned(): boolean {
    return this.ids.every((id) => id === undefined)
  }

  get lead(): Sequence {
    return present(this.members[0], 'a beam')
  }

  /**
   * Takes the distribution after a beam's last token.
   * @returns whether every beam's is in now, so that `advance` may follow
   */
  offer(member: Sequence, logits: Float32Array, sampler: Sampler): boolean {
    const count = Math.max(this.search.candidates, this.request.topLogprobs ?? 0)
    const { top } = sampler.logprobs(logits, 0, count)
    this.search.offer(this.members.indexOf(member), top)
    return ++this.offers === this.members.length
  }

  /**
   * Goes on by a token.
   * @returns the hypotheses, at most one for each of `ids`, if that was the last
   * @throws LatticeError `kv_memory_exhausted` if there is no region for a fork
   */
  advance(scheduler: Scheduler<Sequence>, spansMax: number): Hypothesis[] | undefined {
    this.offers = 0
    const next = this.search.advance()
    if (next.length === 0) return this.search.hypotheses().slice(0, this.ids.length)
    const before = this.members
    const spare = before.filter((_, beam) => !next.some(({ parent }) => parent === beam))
    const stayed = new Set<Sequence>()
    this.members = next.map(({ parent: index, token }) => {
      const parent = present(before[index], 'a parent')
      const member = stayed.has(parent)
        ? this.fork(parent, spare.pop(), scheduler, spansMax)
        : parent
      stayed.add(parent)
      member.length = this.request.prompt.length + this.search.length
      member.tokens[member.length - 1] = token
      return member
    })
    for (const member of spare) scheduler.remove(member, -Infinity)
    return undefined
  }

  restart(): void {
    this.members.length = 1
    this.lead.length = this.request.prompt.length
    this.restarted = true
    this.search = this.begin()
    this.offers = 0
  }

  private begin(): BeamSearch {
    const { maxTokens, stopTokens, topLogprobs } = this.request
    return new BeamSearch(this.params, maxTokens, stopTokens, topLogprobs)
  }

  private fork(
    parent: Sequence,
    spare: Sequence | undefined,
    scheduler: Scheduler<Sequence>,
    spansMax: number,
  ): Sequence {
    const member = spare ?? this.sequence(parent.arrivedMs)
    member.started = true
    if (scheduler.forkBeam(member, parent, spansMax)) return member
    throw new LatticeError('kv_memory_exhausted', 'KV memory has no region left for a beam.', {
      todo: 'Ask for fewer beams, or retry when less is running.',
    })
  }

  private sequence(nowMs: number): Sequence {
    return new Sequence(-1, this.request, [], nowMs, this)
  }
}

/** Pages of beams that have nothing in common but the pages of the prompt that can be shared. */
function pagesOf(layout: KvLayout, prompt: number, output: number, width: number): number {
  const shared = shareableColumns(layout, prompt)
  const own = columnsFor(layout, prompt + output) - shared
  return (shared + width * own) * layout.ranges
}

function checked({ beams, sampling }: SequenceRequest, answers: number): BeamParams {
  const params = present(beams, 'beams')
  const { width, lengthPenalty } = params
  if (!Number.isInteger(width) || width < 2 || answers > width) {
    throw wrong('best_of', `${answers} of ${width} beams were asked for.`, 'Ask for 2 or more.')
  }
  if (!Number.isFinite(lengthPenalty)) {
    throw wrong('length_penalty', `length_penalty is ${lengthPenalty}.`, 'Give a number.')
  }
  const { temperature, repetitionPenalty, presencePenalty, frequencyPenalty } = sampling
  const penalised = repetitionPenalty !== 1 || presencePenalty !== 0 || frequencyPenalty !== 0
  if (temperature !== 0 || penalised || sampling.logitBias.length > 0) {
    throw wrong('use_beam_search', 'A beam search takes likelihoods as they are.', 'Do not sample.')
  }
  return params
}

function wrong(param: string, what: string, todo: string): LatticeError {
  return new LatticeError('invalid_request', what, { todo, details: { param } })
}

/** Why a beam search ends without as many answers as were asked for. */
export function tooFew(found: number): LatticeError {
  return new LatticeError('invalid_request', `The beam search found only ${found} answers.`, {
    todo: 'Ask for fewer answers: there are not as many that are possible.',
    details: { param: 'n' },
  })
}

/** Why a beam search has no forks. */
export function beamsFork(): LatticeError {
  return new LatticeError('invalid_request', 'A beam search cannot be forked.', {
    todo: 'Fork a sequence that samples, or ask for more beams.',
  })
}
