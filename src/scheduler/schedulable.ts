// Owns what the scheduler asks of those around it: what it sees of sequences and of units of them,
// what they share, and how who made room comes back.

import type { Image } from '../kv/image.ts'
import type { KvSpan } from '../kv/regions.ts'
import type { Tiers } from '../kv/tiers.ts'

/** What the scheduler sees, and changes, of a sequence. */
export interface Schedulable {
  /** Tokens known: prompt and output. */
  readonly length: number
  /** The first of them, which are computed in chunks; what was decoded is computed so again. */
  readonly promptLength: number
  /** Tokens whose KV is in memory. */
  computed: number
  /** Tokens that it may have in the end. */
  readonly lengthMax: number
  /** -1 while waiting. */
  slot: number
  /** What it has outside of memory, or on the way; it does not run meanwhile. */
  image: Image | undefined
  /** In which order it was first let in; 0: it never was. The scheduler sets it. */
  turn: number
  /** How often it had to make room. */
  preemptions: number
  /** Those it goes together with, if any. */
  readonly unit?: SchedulingUnit<Schedulable> | undefined
}

/**
 * Sequences that are let in, decode and give way together, such as beams. One of them waits for
 * all; when its prompt is computed the others fork from it.
 */
export interface SchedulingUnit<S> {
  /** Sequences that it will have, at most. */
  readonly width: number
  /** Pages that it may need to run to its end, and those that it is to find when it is let in. */
  readonly pagesMost: number
  readonly pagesToEnter: number
  /** Those that run, or the one that waits. */
  readonly members: readonly S[]
  /** All have lost their memory: leaves one that begins again. */
  restart(): void
}

/** What of a sequence may be in memory before it is let in. */
export interface Sharing<S> {
  /**
   * Where its first tokens lie; 'wait' while another sequence is about to compute them, 'coming'
   * while they come from outside of memory: others may go first, and leave a place for who waits.
   */
  prefixOf(sequence: S): readonly KvSpan[] | 'wait' | 'coming'
  /** Lets go of a cached prefix, to make room. False if there is none. */
  evict(): boolean
  /**
   * A sequence is about to lose its slot to make room; it will wait again.
   * @param alone nobody else runs
   */
  preempted?(sequence: S, alone: boolean): void
}

/** How a sequence that makes room comes back. */
export interface Preemption {
  readonly tiers: Tiers
  /** Something is on its way out of memory or back. */
  readonly busy: boolean
  /** Pages that become free without anybody's doing. */
  readonly leavingPages: number
  /** Whether moving so many pages costs less than computing so many tokens. */
  preferMoving(pages: number, promptTokens: number, outputTokens: number): boolean
}

/** Those that go together, the first of which waits for all; itself alone without a unit. */
export function membersOf<S extends Schedulable>(sequence: S): readonly S[] {
  return (sequence.unit?.members ?? [sequence]) as readonly S[]
}

/**
 * Its prompt is in memory: it goes on by a token a step. After a preemption these are known at
 * first, and computed as they were before, so that they have the same bits.
 */
export function isDecoding(sequence: Schedulable): boolean {
  return sequence.computed >= sequence.promptLength
}

/** Places that a running sequence takes: the first of a unit takes all of the unit's. */
export function placesOf(sequence: Schedulable): number {
  const { unit } = sequence
  if (!unit) return 1
  return unit.members[0] === sequence ? unit.width : 0
}
