// Owns one simulated engine and everything around it: the clock, the clients and what they must
// get, the memory, and the invariants that hold after every step.

import { assert, present } from '../../src/assert.ts'
import type { FinishReason, SequenceRequest, TokenLogprobs } from '../../src/engine/api.ts'
import { type CoreSink, EngineCore } from '../../src/engine/core.ts'
import type { Sequence } from '../../src/engine/sequence.ts'
import { LatticeError } from '../../src/errors.ts'
import type { Random } from '../support/random.ts'
import { SimBackend } from './backend.ts'
import type { SimConfig } from './config.ts'
import type { PrefixNode } from '../../src/kv/prefix.ts'
import { type Insides, insidesOf } from './insides.ts'
import { saltOf, SimMemory } from './memory.ts'
import { Expected, Oracle } from './oracle.ts'
import { AskedPrompts } from './prompts.ts'

/** What a simulation builds an engine from; a test of the simulator puts broken parts in. */
export interface Parts {
  memory: typeof SimMemory
  backend: typeof SimBackend
  /** Called with every new engine. */
  tamper(core: EngineCore): void
}

export const SOUND: Parts = { memory: SimMemory, backend: SimBackend, tamper: () => {} }

/** How often something rare was met: a simulator that never preempts proves nothing about it. */
export interface Coverage {
  finished: number
  aborted: number
  failed: number
  cachedTokens: number
  maps: number
  preemptions: number
  restarts: number
}

/** Steps beyond its share of the work that a sequence may take. */
const DEADLINE_SLACK = 8

/** What a sequence whose prompt is to be pinned may end with. */
const PIN_ERRORS = new Set(['prefix_memory_exhausted', 'invalid_request'])

export class World implements CoreSink {
  readonly config: SimConfig
  nowMs = 0
  steps = 0
  /** By id, in order of arrival: those that have not ended. */
  readonly expected = new Map<number, Expected>()
  readonly coverage: Coverage = {
    finished: 0,
    aborted: 0,
    failed: 0,
    cachedTokens: 0,
    maps: 0,
    preemptions: 0,
    restarts: 0,
  }
  core!: EngineCore
  backend!: SimBackend
  memory!: SimMemory
  private readonly parts: Parts
  private readonly oracle: Oracle
  private insides!: Insides
  private asked!: AskedPrompts
  /** Tenant and name of each pinned prefix. */
  readonly pinned = new Set<string>()
  private readonly salts = new Map<string, number>()
  private readonly bySlot: (Sequence | undefined)[] = []
  private ids = 0
  /** Tokens that the sequences that have not ended may take, prompts and all. */
  private work = 0
  private aborting = -1
  private refusing = -1
  /** What shall fail, and whether it has. */
  private armed: 'launch' | 'collect' | 'map' | 'discard' | undefined

  constructor(config: SimConfig, parts: Parts) {
    this.config = config
    this.parts = parts
    this.oracle = new Oracle(config.vocab)
    this.start()
  }

  // What operations do.

  /** Ids for `count` new sequences, the first of them. */
  nextId(count: number): number {
    this.ids += count
    return this.ids - count
  }

  /** The id of a sequence that was, is or will be. */
  someId(random: Random): number {
    return random.below(this.ids + 1)
  }

  /** `choices` sequences that differ in their seeds, with ids from `first` on. */
  submit(first: number, drawn: SequenceRequest, choices: number): void {
    const ids = Array.from({ length: choices }, (_, i) => first + i)
    const requests = ids.map((id, i) => {
      const sampling = { ...drawn.sampling, seed: drawn.sampling.seed + i }
      const request = { ...drawn, requestId: `request ${first}`, sampling }
      this.work += workOf(request)
      // Alone with a cached prefix that takes the last page, one begins once more without.
      const deadline = this.steps + 2 * this.work + this.expected.size + DEADLINE_SLACK
      this.expected.set(id, new Expected(id, request, deadline, this.oracle))
      return request
    })
    const samplings = requests.map(({ sampling }) => sampling)
    this.core.submitChoices(ids, present(requests[0], 'a choice'), samplings)
    const taken = ids.every((id) => this.expected.has(id))
    assert(taken || drawn.pin !== undefined, `request ${first} is not refused`)
  }

  submitRefused(id: number, request: SequenceRequest): void {
    this.refusing = id
    this.core.submit(id, request)
    assert(this.refusing === -1, `sequence ${id} is refused`)
  }

  abort(id: number): void {
    this.aborting = id
    this.guard(() => this.core.abort(id))
    this.aborting = -1
    assert(!this.expected.has(id), `sequence ${id} ends when it is aborted`)
  }

  unpin(tenant: string, pin: string): void {
    this.guard(() => {
      const pinned = this.core.answer({ kind: 'unpin', tenant, id: pin })
      assert(pinned === this.pinned.delete(`${tenant}: ${pin}`), 'what is pinned can be unpinned')
    })
  }

  settle(): void {
    this.guard(() => {
      const ms = this.core.settle()
      assert(ms === undefined || ms >= 0, 'time to wait is not negative')
    })
  }

  failNext(what: 'launch' | 'collect' | 'map' | 'discard'): void {
    this.armed = what
    if (what === 'launch' || what === 'collect') this.backend.fault = what
  }

  // What the engine tells.

  onStart(id: number, cachedTokens: number): void {
    const expected = this.of(id)
    expected.start()
    const { tenant, prompt } = expected.request
    const asked = this.asked.ask(tenant, prompt)
    assert(cachedTokens <= asked, `sequence ${id} finds nothing that its tenant has not asked`)
    this.coverage.cachedTokens += cachedTokens
  }

  onToken(id: number, token: number, logprobs: TokenLogprobs | undefined): void {
    const expected = this.of(id)
    expected.token(token, logprobs)
    this.computed(expected)
  }

  onFinish(id: number, reason: FinishReason, outputTokens: number, error?: LatticeError): void {
    assert((reason === 'error') === (error !== undefined), 'an error is told with its reason')
    if (id === this.refusing) {
      assert(error?.code === 'invalid_request', 'a wrong request is told so')
      this.refusing = -1
      return
    }
    const expected = this.of(id)
    if (reason === 'abort') {
      assert(id === this.aborting, `sequence ${id} is not aborted by itself`)
      expected.end(outputTokens)
      this.coverage.aborted++
    } else if (reason === 'error') {
      const poisoned = this.backend.fault === 'nan' && error?.code === 'backend_failed'
      const unpinnable = expected.request.pin !== undefined && PIN_ERRORS.has(error?.code ?? '')
      assert(poisoned || unpinnable, `sequence ${id} ends without an error: ${error?.message}`)
      expected.end(outputTokens)
      if (poisoned) this.computed(expected)
      this.coverage.failed++
    } else {
      expected.finish(reason, outputTokens)
      this.computed(expected)
      this.coverage.finished++
    }
    if (this.config.prefixOutput) this.asked.ask(expected.request.tenant, expected.tokens)
    this.expected.delete(id)
    this.work -= workOf(expected.request)
  }

  // The engine's own time.

  /** One step of the engine, then every invariant. */
  advance(): void {
    this.nowMs += 1
    this.steps++
    this.guard(() => {
      const busy = this.core.step()
      assert(busy || this.expected.size === 0, 'an engine with sequences has something to do')
      if (busy) this.backend.fault = undefined
      else if (this.backend.fault === 'nan') this.backend.fault = undefined
    })
    this.check()
  }

  /** Lets everything end, time pass and every prefix go: nothing may be left. */
  finish(): void {
    this.armed = undefined
    this.backend.fault = undefined
    while (this.expected.size > 0) this.advance()
    for (const { tenant, id } of [...(this.insides.cache?.pins.list ?? [])]) {
      this.unpin(tenant, id)
    }
    for (let wait = this.core.settle(); wait !== undefined; wait = this.core.settle()) {
      this.nowMs += wait
    }
    this.check()
    const { regionTable, cache } = this.insides
    assert(regionTable.usedPages === regionTable.cachedPages, 'only cached prefixes stay')
    while (cache?.evict());
    this.check()
    assert(regionTable.usedPages === 0, 'no page is left behind')
    assert(this.memory.residentBytes() === 0, 'no memory is left behind')
    this.count()
  }

  checkSnapshot(): void {
    const { sequences, running, waiting, kv } = this.core.snapshot()
    const { slots, regions } = this.insides
    assert(sequences.length === this.expected.size, 'a snapshot has every sequence')
    assert(running + waiting === sequences.length, 'a sequence runs or waits')
    assert(running <= slots.filter(({ state }) => state === 'held').length, 'who runs has a slot')
    let columns = 0
    for (const region of regions)
      region?.live.forEach((n, c) => (columns += +(n + region.cache[c]! > 0)))
    assert(kv.usedPages === columns * this.config.layout.ranges, 'a snapshot has every page')
    assert(kv.residentBytes <= kv.usedPages * kv.pageBytes, 'what is in memory is counted')
  }

  /** Its prompt is in memory, or was: it is pinned if it asked for that. */
  private computed({ request: { tenant, pin } }: Expected): void {
    if (pin !== undefined) this.pinned.add(`${tenant}: ${pin}`)
  }

  private check(): void {
    this.core.check()
    const pinned = this.insides.cache?.pins.list ?? []
    const known = pinned.every(({ tenant, id }) => this.pinned.has(`${tenant}: ${id}`))
    assert(known && pinned.length === this.pinned.size, 'what is pinned stays, nothing else')
    const { memory, insides } = this
    memory.checkCounted(insides.regions)
    insides.slots.forEach(({ state, region, shared }, slot) => {
      if (state === 'held') memory.checkMapped(slot, region, shared)
    })
    for (const [tenant, root] of insides.roots) this.checkNode(root, this.saltOf(tenant))
    for (const { id, deadline } of this.expected.values()) {
      assert(this.steps <= deadline, `sequence ${id} ends in the time that its work takes`)
      // Who comes later has a later deadline.
      break
    }
  }

  /** What is cached is in memory, as its tenant's tokens left it. */
  private checkNode(node: PrefixNode, before: number): void {
    const { region, from, tokens, children } = node
    const hash = tokens.length > 0 ? this.memory.checkRows(region, from, tokens, before) : before
    for (const child of children.values()) this.checkNode(child, hash)
  }

  /** Runs the engine; if what was injected stops it, its clients are told and a new one starts. */
  private guard(act: () => void): void {
    try {
      act()
    } catch (thrown) {
      if (!isInjected(thrown)) throw thrown
      assert(this.armed !== undefined, 'an engine stops for the error that was injected')
      this.coverage.restarts++
      this.count()
      this.start()
    }
  }

  private start(): void {
    const { config, parts } = this
    const { layout, slots, regions, maxSequences, kvPages, prefixPages, spansMax } = config
    this.memory = new parts.memory(layout, slots, regions)
    this.backend = new parts.backend(config, this.memory)
    const { prefixEviction, prefixOutput } = config
    const options = { maxSequences, kvPages, prefixPages, prefixEviction, prefixOutput }
    this.core = new EngineCore(this.backend, options, this, () => this.nowMs)
    this.insides = insidesOf(this.core)
    this.insides.sharing.spansMax = spansMax
    this.asked = new AskedPrompts()
    this.pinned.clear()
    this.expected.clear()
    this.work = 0
    this.aborting = -1
    this.armed = undefined
    this.memory.onMove = (what) => {
      if (what === 'map') this.coverage.maps++
      if (this.armed === what) throw new LatticeError('os_call_failed', `injected at ${what}`)
    }
    this.backend.onLaunch = () => {
      for (const sequence of this.insides.running) {
        this.bySlot[sequence.slot] = sequence
        this.memory.salts[sequence.slot] = this.saltOf(sequence.request.tenant)
      }
    }
    this.backend.onRead = (slot, tokens, digest) => {
      const { id } = present(this.bySlot[slot], 'a sequence')
      const right = digest === this.of(id).digest
      assert(right, `the ${tokens} tokens that slot ${slot} reads are those of sequence ${id}`)
    }
    parts.tamper(this.core)
  }

  private count(): void {
    this.coverage.preemptions += this.core.snapshot().preemptions
  }

  private of(id: number): Expected {
    return present(this.expected.get(id), `sequence ${id}, which has not ended,`)
  }

  private saltOf(tenant: string): number {
    let salt = this.salts.get(tenant)
    if (salt === undefined) this.salts.set(tenant, (salt = saltOf(tenant)))
    return salt
  }
}

function workOf({ prompt, maxTokens }: SequenceRequest): number {
  return prompt.length + maxTokens
}

function isInjected(thrown: unknown): boolean {
  return thrown instanceof LatticeError && thrown.message.startsWith('injected')
}
