// Owns what sequences share of their prompts: choices of one request among each other, and any
// request with the cached prefixes of its tenant.

import { LatticeError } from '../errors.ts'
import type { KvSpan } from '../kv/regions.ts'
import type { PrefixCache } from '../kv/prefix.ts'
import type { SlotTable } from '../kv/slots.ts'
import type { Sharing } from '../scheduler/scheduler.ts'
import type { PinnedPrefix, SequenceRequest } from './api.ts'
import type { Sequence } from './sequence.ts'

export interface SharingOptions {
  /** Tokens that are computed at least: a prompt's last chunk is as long as it would be. */
  computeMin: number
  /** Other regions that a slot's tokens may lie in, at most. */
  spansMax: number
  /** Answers are cached too; what follows one then has other bits than computed anew. */
  output: boolean
  /** Told of each sequence that makes room, with the pages of its own that go. */
  onPreempt?: (pages: number) => void
}

export class PromptSharing implements Sharing<Sequence> {
  /** In tokens, of prompts when they were first let in. */
  queries = 0
  hits = 0
  private readonly slots: SlotTable
  readonly cache: PrefixCache | undefined
  private readonly options: SharingOptions

  constructor(slots: SlotTable, cache: PrefixCache | undefined, options: SharingOptions) {
    this.slots = slots
    this.cache = cache
    this.options = options
  }

  /**
   * Never so much that fewer than `computeMin` tokens are left: their chunk would be too short, and
   * another kernel's bits could change an answer. So it never depends on what was cached.
   */
  prefixOf(sequence: Sequence): readonly KvSpan[] | 'wait' {
    const { tokens, request } = sequence
    const length = Math.min(sequence.length - this.options.computeMin, request.prompt.length)
    let spans: KvSpan[] = []
    const sibling = inMemory(sequence)
    if (sibling) {
      if (sibling.computed < request.prompt.length) return 'wait'
      spans = length > 0 ? this.slots.spansOf(sibling.slot, length) : []
    } else if (this.cache && length > 0) {
      spans = this.cache.lookup(request.tenant, tokens, length)
    }
    return spans.slice(0, this.options.spansMax)
  }

  evict(): boolean {
    return this.cache?.evict() ?? false
  }

  preempted({ slot }: Sequence): void {
    this.options.onPreempt?.(this.slots.pagesOf(slot))
  }

  /** A sequence leaves the queue for the first time, its slot beginning with what it shares. */
  started(sequence: Sequence): void {
    const { group, request, computed } = sequence
    const first = group.find(({ started }) => started)
    if (first) {
      sequence.cachedTokens = first.cachedTokens
      return
    }
    sequence.cachedTokens = computed
    if (!this.cache) return
    this.queries += request.prompt.length
    this.hits += computed
  }

  /**
   * A sequence's prompt is in memory.
   * @throws LatticeError `prefix_memory_exhausted` if it is to be pinned and cannot be
   */
  computed(sequence: Sequence): void {
    const { prompt, tenant, pin } = sequence.request
    this.keep(sequence, prompt)
    if (pin !== undefined) this.cache?.pin(tenant, pin, prompt)
  }

  /** A sequence ends; what it has in memory is still there. */
  ended(sequence: Sequence): void {
    if (!this.options.output || sequence.outputTokens === 0) return
    this.keep(sequence, sequence.tokens.subarray(0, sequence.computed))
  }

  /** @throws LatticeError if a sequence wants its prompt pinned, and that can never be */
  checkPin({ pin, prompt }: SequenceRequest): void {
    if (pin === undefined) return
    if (!this.cache) {
      throw new LatticeError('prefix_memory_exhausted', 'There is no prefix cache to pin in.', {
        todo: 'Start with --prefix-cache SIZE.',
      })
    }
    const { computeMin } = this.options
    if (prompt.length < computeMin) {
      throw new LatticeError(
        'invalid_request',
        `A prefix of ${prompt.length} tokens is too short: shorter ones than ${computeMin} are` +
          ' not cached.',
        { todo: 'Leave it: computing it takes no time.' },
      )
    }
    this.cache.pins.checkFits(prompt.length)
  }

  /** Of every tenant unless one is named. */
  pinned(now: number, tenant?: string): PinnedPrefix[] {
    const { cache } = this
    const list = cache?.pins.list.filter((pin) => tenant === undefined || pin.tenant === tenant)
    return (list ?? []).map((pin) => {
      const pages = cache?.pins.pagesOf(pin) ?? 0
      return {
        id: pin.id,
        tenant: pin.tenant,
        tokens: pin.tokens.length,
        pages,
        bytes: pages * this.slots.layout.shape.pageBytes,
        uses: cache?.usesOf(pin) ?? 0,
        ageMs: now - pin.pinnedMs,
      }
    })
  }

  unpin(tenant: string, id: string): boolean {
    return this.cache?.unpin(tenant, id) ?? false
  }

  get gauges(): { cachedPages: number; pinnedPages: number; evictions: number } {
    const { cachedPages } = this.slots.regions
    const { pins, evictions = 0 } = this.cache ?? {}
    return { cachedPages, pinnedPages: pins?.pages ?? 0, evictions }
  }

  /** A sequence in the queue can start where this one, whose prompt was just computed, is. */
  continues(waiting: Sequence | undefined, source: Sequence): boolean {
    if (waiting?.group !== source.group) return false
    const spans = this.slots.spansOf(source.slot, source.computed)
    return !waiting.started && spans.length <= this.options.spansMax
  }

  check(): void {
    this.slots.check()
    this.cache?.check()
  }

  private keep({ request, slot }: Sequence, tokens: Int32Array): void {
    // Shorter ones are computed by another kernel: no other prompt may find its bits here.
    if (!this.cache || tokens.length < this.options.computeMin) return
    this.cache.insert(request.tenant, tokens, this.slots.spansOf(slot, tokens.length))
  }
}

/** Another one of a sequence's group that has a slot, the furthest one. */
function inMemory({ group }: Sequence): Sequence | undefined {
  let found: Sequence | undefined
  for (const member of group) {
    if (member.slot >= 0 && member.computed > (found?.computed ?? -1)) found = member
  }
  return found
}
