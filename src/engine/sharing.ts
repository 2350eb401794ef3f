// Owns what sequences share of their prompts: choices of one request among each other, and any
// request with the cached prefixes of its tenant.

import { LatticeError } from '../errors.ts'
import { clipSpans, type KvColumns, type KvSpan, spannedTokens } from '../kv/regions.ts'
import type { PrefixCache } from '../kv/prefix.ts'
import type { Watch } from '../kv/prefix-node.ts'
import { beamSpansKept, type SlotTable } from '../kv/slots.ts'
import type { Sharing } from '../scheduler/scheduler.ts'
import type { PinnedPrefix, SequenceRequest } from './api.ts'
import type { Offload } from './offload.ts'
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
  private readonly offload: Offload | undefined
  private readonly options: SharingOptions

  constructor(
    slots: SlotTable,
    cache: PrefixCache | undefined,
    offload: Offload | undefined,
    options: SharingOptions,
  ) {
    this.slots = slots
    this.cache = cache
    this.offload = offload
    this.options = options
  }

  prefixOf(sequence: Sequence): readonly KvSpan[] | 'wait' | 'coming' {
    const { tokens, promptLength, request, unit } = sequence
    if (unit?.restarted || sequence.cramped) return []
    let spans: KvSpan[] = []
    if (this.waits(sequence)) return 'wait'
    const sibling = inMemory(sequence)
    if (sibling) {
      spans = this.slots.spansOf(sibling.slot, promptLength)
    } else if (this.cache) {
      if (this.comes(sequence)) return 'coming'
      spans = this.cache.lookup(request.tenant, tokens, promptLength)
    }
    // Beams lie in more and more regions; of those that they may, a prompt gets less than half.
    const spansMax = unit ? beamSpansKept(this.options.spansMax) - 1 : this.options.spansMax
    return this.usable(sequence, spans.slice(0, spansMax))
  }

  /** Another one of its group is about to compute its prompt. */
  waits(sequence: Sequence): boolean {
    const sibling = inMemory(sequence)
    return sibling !== undefined && sibling.computed < sequence.promptLength
  }

  /**
   * All of a prompt, if nothing is sampled from its end any more. Else never so much that fewer
   * than `computeMin` tokens are left: their chunk would be too short, and another kernel's bits
   * could change an answer. So it never depends on what was cached.
   */
  private usable({ promptLength, outputTokens }: Sequence, spans: KvSpan[]): KvSpan[] {
    if (outputTokens > 0 && spannedTokens(spans) === promptLength) return spans
    return clipSpans(spans, promptLength - this.options.computeMin)
  }

  /**
   * What is cached outside of memory of its prompt is on its way. It waits for that once: if memory
   * is short it may have to go again, and a sequence must not wait for ever.
   */
  private comes(sequence: Sequence): boolean {
    const { tokens, promptLength, request } = sequence
    if (sequence.fetched === 'done') return false
    const length = promptLength - (sequence.outputTokens > 0 ? 0 : this.options.computeMin)
    const comes =
      sequence.fetched === 'coming'
        ? this.cache?.cold(request.tenant, tokens, length) === 'coming'
        : this.offload?.fetch(request.tenant, tokens, length)
    sequence.fetched = comes ? 'coming' : 'done'
    return comes ?? false
  }

  evict(): boolean {
    return this.cache?.evict() ?? false
  }

  preempted(sequence: Sequence, alone: boolean): void {
    this.options.onPreempt?.(this.slots.pagesOf(sequence.slot))
    if (alone) sequence.cramped = true
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

  /** Ids of those of a prompt's prefixes that are cached; they are watched from now on. */
  watch(tenant: string, tokens: Int32Array, prefixes: readonly Watch[]): string[] {
    return prefixes
      .filter((prefix) => this.cache?.watches.watch(tenant, tokens, prefix))
      .map(({ id }) => id)
  }

  forgotten(): string[] {
    return this.cache?.watches.take() ?? []
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

  get gauges(): Record<'cachedPages' | 'prefixLimitPages' | 'pinnedPages' | 'evictions', number> {
    const { cachedPages } = this.slots.regions
    const { pins, budgetPages = 0, evictions = 0 } = this.cache ?? {}
    const pinnedPages = pins?.pages ?? 0
    return { cachedPages, prefixLimitPages: budgetPages, pinnedPages, evictions }
  }

  /** A sequence in the queue can start where this one, whose prompt was just computed, is. */
  continues(waiting: Sequence | undefined, source: Sequence): boolean {
    if (waiting?.group !== source.group || waiting.length !== source.length) return false
    return !waiting.started && this.spreads(source)
  }

  /** What a sequence has in memory lies in few enough places to be forked. */
  spreads(source: Sequence): boolean {
    return this.slots.spansOf(source.slot, source.computed).length <= this.options.spansMax
  }

  /**
   * Throws if the account of memory contradicts itself or those who hold it.
   * @param kept what is held besides by neither slots nor the cache
   */
  check(kept: Iterable<KvColumns> = []): void {
    const { slots, cache } = this
    slots.check()
    cache?.check()
    const live = [...slots.holds(), ...(cache?.pins.holds() ?? []), ...kept]
    slots.regions.checkHolders('live', live)
    slots.regions.checkHolders('cache', cache?.holds() ?? [])
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
