// Owns the engine's loop body: what has been admitted is planned, stepped and committed. It has no
// thread and no clock of its own, so that it runs the same in a worker, in a test and in a
// simulation.
//
//   submit ──▶ queue ──plan──▶ parts of a step ──launch──▶ logits ──commit──▶ tokens ──▶ queue …
//              (Scheduler)                      (Backend)           (Outcomes)
//
// Newcomers start at `step`.

import { present } from '../assert.ts'
import { LatticeError } from '../errors.ts'
import type { KvHistory } from '../kv/history.ts'
import { type KvMap, kvMap } from '../kv/map.ts'
import type { SlotTable } from '../kv/slots.ts'
import type { Costs } from '../scheduler/costs.ts'
import { isDecoding, type ScheduledPart, Scheduler } from '../scheduler/scheduler.ts'
import { type Backend, StepBatch } from '../backends/backend.ts'
import type {
  EngineAnswers,
  EngineQuestion,
  EngineSnapshot,
  SamplingParams,
  SequenceRequest,
} from './api.ts'
import { answerOf } from './answers.ts'
import { type Flight, StepsAhead, workOf } from './ahead.ts'
import { BeamGroup, beamsFork } from './beam-group.ts'
import type { CoreOptions, CoreSink } from './core-contract.ts'
import { engineMemory, giveBack, releaseOverdue } from './memory.ts'
import { sequenceEnded } from './messages.ts'
import type { Offload } from './offload.ts'
import { Outcomes } from './outcomes.ts'
import { Sequence } from './sequence.ts'
import type { Sessions } from './sessions.ts'
import type { PromptSharing } from './sharing.ts'
import { memoryTaken, Shortage } from './shortage.ts'
import { snapshotOf } from './snapshot.ts'

/** How soon to look again for what is on its way, when there is nothing else to do. */
const TIER_WAIT_MS = 1

/** How soon to look again whether what shall outlive the process can be written. */
const KEEP_WAIT_MS = 50

export class EngineCore {
  private readonly backend: Backend
  private readonly now: () => number
  private readonly slots: SlotTable
  private readonly sharing: PromptSharing
  private readonly history: KvHistory
  private readonly scheduler: Scheduler<Sequence>
  private readonly offload: Offload | undefined
  private readonly sessions: Sessions | undefined
  private readonly costs: Costs
  private readonly ahead: StepsAhead | undefined
  private readonly shortage: Shortage | undefined
  private landedMs = -Infinity
  private readonly batch: StepBatch
  private readonly outcomes: Outcomes
  private keptMs = 0

  /** @param now milliseconds that never go back. */
  constructor(backend: Backend, options: CoreOptions, sink: CoreSink, now: () => number) {
    this.backend = backend
    this.now = now
    const memory = engineMemory(backend, options, now)
    this.slots = memory.slots
    this.history = memory.history
    this.costs = memory.costs
    this.offload = memory.offload
    this.sessions = memory.sessions
    this.sharing = memory.sharing
    const { chunkTokensMin, vocab } = backend
    const { maxSequences, greedy = false } = options
    this.scheduler = new Scheduler(
      this.slots,
      { stepTokens: backend.stepTokensMax, maxSequences, chunkTokensMin, greedy },
      this.sharing,
      this.offload,
    )
    const { contended } = backend.kv
    this.shortage = contended && new Shortage(contended, this.slots, this.scheduler, this.offload)
    this.ahead = backend.chooser && new StepsAhead(backend, backend.chooser)
    this.batch = new StepBatch(backend.stepTokensMax, options.maxSequences)
    const { scheduler, sharing } = this
    const { spansMax } = memory
    this.outcomes = new Outcomes({ scheduler, sharing, sink, now, vocab, spansMax })
  }

  get idle(): boolean {
    return this.outcomes.sequences.size === 0 && !this.ahead?.flight
  }

  /** Takes a sequence in; its first token comes from a later step. */
  submit(id: number, request: SequenceRequest): void {
    if (request.beams) this.submitBeams([id], request)
    else this.enqueue(id, request)
  }

  /** Takes in sequences that differ in their sampling only: their prompt is computed once. */
  submitChoices(
    ids: readonly number[],
    request: SequenceRequest,
    samplings: readonly SamplingParams[],
  ): void {
    if (request.beams) return this.submitBeams(ids, request)
    const group: Sequence[] = []
    ids.forEach((id, i) => {
      const sampling = present(samplings[i], 'sampling of a choice')
      this.enqueue(id, { ...request, sampling }, group)
    })
  }

  /** @param group the choices of its request so far */
  private enqueue(id: number, request: SequenceRequest, group?: Sequence[]): void {
    try {
      this.sharing.checkPin(request)
      const sequence = new Sequence(id, request, group, this.now())
      group?.push(sequence)
      this.outcomes.sequences.set(id, sequence)
      this.scheduler.waiting.push(sequence)
    } catch (thrown) {
      this.report([id], thrown)
    }
  }

  private submitBeams(ids: readonly number[], request: SequenceRequest): void {
    this.orReport(ids, () => {
      const group = new BeamGroup(ids, request, this.backend.kv.layout, this.now())
      this.scheduler.checkUnit(group)
      for (const id of ids) this.outcomes.sequences.set(id, group.lead)
      this.scheduler.waiting.push(group.lead)
    })
  }

  /** Takes in a sequence that begins with the tokens that another one has now. */
  fork(parent: number, id: number, sampling: SamplingParams): void {
    const { sequences } = this.outcomes
    this.orReport([id], () => {
      // Its tokens are to be known.
      if (this.ahead?.flight) this.land(this.ahead, present(this.ahead.take(), 'a step'))
      const source = sequences.get(parent)
      if (!source) throw sequenceEnded()
      if (source.unit) throw beamsFork()
      const fork = source.fork(id, sampling, this.now())
      const { group } = source
      group.splice(0, Infinity, ...group.filter((one) => sequences.has(one.id)), fork)
      sequences.set(id, fork)
      const decodes = source.slot >= 0 && isDecoding(source)
      if (!decodes || !this.sharing.spreads(source) || !this.scheduler.fork(fork, source)) {
        this.scheduler.waiting.push(fork)
      }
    })
  }

  private orReport(ids: readonly number[], takeIn: () => void): void {
    try {
      takeIn()
    } catch (thrown) {
      this.report(ids, thrown)
    }
  }

  /** What cannot be taken in ends at once, and says why. */
  private report(ids: readonly number[], thrown: unknown): void {
    if (!(thrown instanceof LatticeError)) throw thrown
    for (const id of ids) this.outcomes.report(id, 'error', 0, thrown)
  }

  abort(id: number): void {
    const sequence = this.outcomes.sequences.get(id)
    if (!sequence) return
    const { unit } = sequence
    if (!unit) return this.outcomes.finish(sequence, 'abort')
    unit.ids[unit.ids.indexOf(id)] = undefined
    this.outcomes.report(id, 'abort', 0)
    if (unit.abandoned) this.outcomes.endBeams(unit, -Infinity)
  }

  /**
   * Runs one step: every decoding sequence gains a token and prompts advance by a chunk.
   * @returns false if there was nothing to do, or all wait for what comes from outside of memory.
   * @throws what the backend throws; then the core is of no more use.
   */
  step(): boolean {
    const start = this.now()
    this.hear(start)
    this.shortage?.look(start)
    const planned = this.scheduler.plan()
    const parts = this.shortage?.sift(planned, start) ?? planned
    // After the plan: what has just come back for a sequence must not go before that begins.
    this.offload?.keepRoom()
    if (start - this.keptMs > KEEP_WAIT_MS) this.keep()
    if (parts.length === 0 && !this.ahead?.flight) return this.giveUpStuck()
    if (this.ahead) this.stepAhead(this.ahead, parts)
    else this.stepAlone(parts)
    releaseOverdue(this.slots, this.now())
    this.outcomes.counts.stepMs += this.now() - start
    return true
  }

  /** A step from its launch to its tokens. */
  private stepAlone(parts: readonly ScheduledPart<Sequence>[]): void {
    this.fill(parts)
    const start = this.now()
    this.backend.launch(this.batch)
    this.expectGrowth(parts)
    const rows = this.backend.collect()
    // What a step read after the pager's death is not what was there: nothing of it is told.
    this.backend.kv.tier?.check()
    const ms = this.now() - start
    this.costs.stepped(workOf(parts), ms)
    this.commit(parts, rows)
    this.outcomes.counts.stepped(ms)
  }

  private fill(parts: readonly ScheduledPart<Sequence>[]): void {
    this.batch.clear()
    for (const { sequence, count } of parts) {
      const { slot, computed, tokens, length } = sequence
      this.outcomes.start(sequence)
      this.batch.add(slot, computed, tokens, computed, count, computed + count === length)
    }
  }

  /** While a step computes, memory can be made ready for the next. */
  private expectGrowth(parts: readonly ScheduledPart<Sequence>[]): void {
    const { maxTokens } = this.backend.kv.layout.shape
    for (const { sequence, count } of parts) {
      const after = sequence.computed + count
      const chunk = Math.min(sequence.length - after, this.backend.stepTokensMax)
      this.slots.expect(sequence.slot, Math.min(after + Math.max(1, chunk), maxTokens))
    }
  }

  /** What a step computed is in memory: whoever has all of its tokens there gets another one. */
  private commit(parts: readonly ScheduledPart<Sequence>[], rows: readonly Float32Array[]): void {
    const { outcomes } = this
    let row = 0
    for (const { sequence, count } of parts) {
      sequence.computed += count
      if (sequence.outputTokens === 0) outcomes.counts.promptTokens += count
      if (sequence.computed < sequence.length) continue
      const logits = present(rows[row++], 'a row of logits')
      if (sequence.outputTokens === 0 && !outcomes.share(sequence, logits)) continue
      outcomes.advance(sequence, logits)
    }
  }

  /** Queues a step, then takes in the one before it: while this runs, that one computes. */
  private stepAhead(ahead: StepsAhead, parts: readonly ScheduledPart<Sequence>[]): void {
    const before = ahead.take()
    if (parts.length > 0) {
      this.fill(parts)
      ahead.launch(parts, this.batch, this.now())
      this.expectGrowth(parts)
      for (const { sequence, count } of parts) this.goOn(ahead, sequence, count)
    }
    if (before) this.land(ahead, before)
    if (ahead.flight?.hosted) this.land(ahead, present(ahead.take(), 'a step'))
  }

  /** A sequence's tokens are as good as computed: whoever is planned next follows them. */
  private goOn(ahead: StepsAhead, sequence: Sequence, count: number): void {
    const first = sequence.length === sequence.promptLength
    sequence.computed += count
    if (first) this.outcomes.counts.promptTokens += count
    if (sequence.computed < sequence.length) return
    if (first && !this.outcomes.keepPrompt(sequence)) return
    if (!ahead.isHosted(sequence)) sequence.pushUnknown()
  }

  /** Waits for a step that was queued, and takes its tokens in. */
  private land(ahead: StepsAhead, flight: Flight): void {
    const { outcomes } = this
    const rows = ahead.wait(flight)
    this.backend.kv.tier?.check()
    const now = this.now()
    const ms = now - Math.max(flight.startMs, this.landedMs)
    this.landedMs = now
    this.costs.stepped(flight.work, ms)
    outcomes.counts.stepped(ms)
    let output = -1
    for (const { sequence, position } of flight.awaited) {
      output++
      if (sequence.ended) continue
      if (position < 0) outcomes.advance(sequence, present(rows[output], 'a row of logits'))
      else {
        const token = present(sequence.tokens[position], 'a token')
        outcomes.takeIn(sequence, token, ahead.logprobsOf(flight, output, sequence))
      }
    }
  }

  /** Ends who has no room even alone: beams because of what is pinned, or anybody in a shortage. */
  private giveUpStuck(): boolean {
    const { shortage, scheduler, outcomes } = this
    const hopeless = shortage?.hopeless(this.now())
    if (hopeless) {
      outcomes.fail(hopeless, memoryTaken())
      return true
    }
    // What does not fit while memory is short may fit again.
    const stuck = shortage?.short ? undefined : scheduler.stuck
    if (!stuck?.unit) return false
    outcomes.fail(stuck, scheduler.tooLarge(stuck.unit))
    return true
  }

  /**
   * Gives back pages of sequences that ended, slot by slot: called again and again while there is
   * nothing else to do, it holds up a sequence that arrives by a millisecond, not by all of them.
   * @returns milliseconds until there is more to give back, or undefined if there is nothing.
   */
  settle(): number | undefined {
    const wait = giveBack(this.slots, this.backend.kv, this.idle, this.now(), this.shortage)
    this.offload?.keepRoom()
    this.keep()
    if (this.offload?.busy) {
      if (this.idle) this.hear(this.now())
      return Math.min(wait ?? Infinity, TIER_WAIT_MS)
    }
    return this.offload?.keeping ? Math.min(wait ?? Infinity, KEEP_WAIT_MS) : wait
  }

  /** What has moved since the last time; before that, what had no memory to come back to. */
  private hear(nowMs: number): void {
    this.shortage?.notice(nowMs)
    this.scheduler.settle(nowMs)
    this.shortage?.letGo()
  }

  /**
   * Before the end: writes what shall outlive the process.
   * @returns false when there is no more to write
   */
  flush(): boolean {
    return this.offload?.flush(this.now()) ?? false
  }

  private keep(): void {
    this.keptMs = this.now()
    this.offload?.keep()
  }

  /** Throws if the account of memory contradicts itself. */
  check(): void {
    this.offload?.check()
    this.sharing.check(this.offload?.holds())
  }

  /** The machine has too little memory: cached prefixes go out of it. */
  relieve(): void {
    this.offload?.relieve()
  }

  snapshot(): EngineSnapshot {
    const { backend, slots, scheduler, sharing, offload } = this
    const { counts } = this.outcomes
    return snapshotOf({ kv: backend.kv, slots, scheduler, sharing, offload, counts }, this.now())
  }

  /** Answers what was asked, or does what was told, between two steps. */
  answer<Q extends EngineQuestion>(question: Q): EngineAnswers[Q['kind']]
  answer(question: EngineQuestion): EngineAnswers[keyof EngineAnswers] {
    // Nobody looks while nobody computes.
    if (question.kind === 'reload') this.shortage?.look(this.now())
    if (question.kind === 'map') return { snapshot: this.snapshot(), map: this.map() }
    return answerOf(question, this.sharing, this.sessions, this.now())
  }

  private map(): KvMap {
    const { slots, history, offload } = this
    const { running, waiting } = this.scheduler
    const sequences = [...running, ...waiting]
    return kvMap(slots, this.sharing.cache, history, sequences, this.now(), offload?.outside)
  }
}
