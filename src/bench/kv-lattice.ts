// Owns this project's own memory manager as it is compared: the policy code itself, over memory
// that holds a hash in place of keys and values and throws where one would be wrong.

import { assert, present } from '../assert.ts'
import { extendHash, NullKvMemory } from '../backends/null/kv-memory.ts'
import { KvHistory, watched } from '../kv/history.ts'
import { layerMajor, pagesFor } from '../kv/layout.ts'
import { PrefixCache } from '../kv/prefix.ts'
import { type KvSpan, RegionTable, regionsFor, spannedTokens } from '../kv/regions.ts'
import { SlotTable } from '../kv/slots.ts'
import { type KvModel, TOKEN_LAYERS, TOKEN_ROW_BYTES } from './kv-model.ts'
import { TRACE_CONTEXT } from './kv-trace.ts'

const PAGE_BYTES = 4096
const SLOTS = 256

/** As the CPU backend wants it: a prompt's last chunk is at least as long. */
const COMPUTE_MIN = 64

interface Running {
  slot: number
  length: number
  hash: number
}

export class LatticeModel implements KvModel {
  private readonly memory: NullKvMemory
  private readonly history = new KvHistory(() => 0)
  private readonly regions: RegionTable
  private readonly slots: SlotTable
  private readonly cache: PrefixCache
  private readonly running = new Map<number, Running>()

  /** @param cachedTokens that prefixes may keep */
  constructor(cachedTokens: number) {
    const shape = { layers: TOKEN_LAYERS, rowBytes: TOKEN_ROW_BYTES, pageBytes: PAGE_BYTES }
    const layout = layerMajor({ ...shape, maxTokens: TRACE_CONTEXT })
    const regions = regionsFor(SLOTS)
    this.memory = new NullKvMemory(layout, SLOTS, regions)
    const mover = watched(this.memory, layout, this.history)
    this.regions = new RegionTable(layout, regions, Number.MAX_SAFE_INTEGER, mover)
    this.slots = new SlotTable(this.regions, SLOTS)
    this.cache = new PrefixCache(this.regions, pagesFor(layout, cachedTokens))
  }

  get copiedBytes(): number {
    return this.history.totals.get('copy')?.bytes ?? 0
  }

  begin(id: number, prompt: Int32Array): number {
    const spans = this.cache.lookup('', prompt, Math.max(0, prompt.length - COMPUTE_MIN))
    const found = spannedTokens(spans)
    const hash = prompt.subarray(0, found).reduce(extendHash, 0)
    const running = this.start(id, spans, { length: found, hash }, prompt.length)
    for (const token of prompt.subarray(found)) this.write(running, token)
    if (prompt.length >= COMPUTE_MIN) {
      this.cache.insert('', prompt, this.slots.spansOf(running.slot, prompt.length))
    }
    return found
  }

  append(id: number, token: number): void {
    this.write(this.of(id), token)
  }

  fork(id: number, from: number): void {
    const { slot, length, hash } = this.of(from)
    this.start(id, this.slots.spansOf(slot, length), { length, hash }, length)
  }

  end(id: number): void {
    const { slot, length, hash } = this.of(id)
    assert(this.memory.hashAt(slot, length - 1) === hash, 'a sequence has its own tokens')
    this.slots.retire(slot, -Infinity)
    while (this.slots.reclaim(Infinity) >= 0);
    this.running.delete(id)
  }

  heldBytes(): number {
    return (this.regions.usedPages - this.regions.evictablePages) * PAGE_BYTES
  }

  private start(
    id: number,
    spans: readonly KvSpan[],
    shared: Pick<Running, 'length' | 'hash'>,
    tokens: number,
  ): Running {
    this.slots.pin(spans)
    let slot = -1
    while (slot < 0) {
      slot = spans.length > 0 ? this.slots.acquireShared(spans) : this.slots.acquire(tokens)
      assert(slot >= 0 || this.cache.evict(), 'a slot and a region are free')
    }
    const running = { slot, ...shared }
    this.running.set(id, running)
    return running
  }

  private write(running: Running, token: number): void {
    assert(this.slots.grow(running.slot, running.length + 1), 'there is memory for a token')
    this.memory.append(running.slot, running.length, token)
    running.hash = extendHash(running.hash, token)
    running.length++
  }

  private of(id: number): Running {
    return present(this.running.get(id), 'a running sequence')
  }
}
