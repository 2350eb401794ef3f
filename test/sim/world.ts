// Owns one simulated engine and everything around it: the clock, the clients and what they must
// get, the memory, and the invariants that hold after every step.

import { assert, present } from '../../src/assert.ts'
import { extendHash } from '../../src/backends/null/kv-memory.ts'
import type { FinishReason, SequenceRequest, TokenLogprobs } from '../../src/engine/api.ts'
import { EngineCore } from '../../src/engine/core.ts'
import type { CoreOptions, CoreSink } from '../../src/engine/core-contract.ts'
import type { Sequence } from '../../src/engine/sequence.ts'
import { LatticeError } from '../../src/errors.ts'
import { checkMap } from '../support/check-map.ts'
import type { Random } from '../support/random.ts'
import { SimBackend } from './backend.ts'
import type { SimConfig } from './config.ts'
import type { PrefixNode } from '../../src/kv/prefix-node.ts'
import { type Insides, insidesOf, tokensOf } from './insides.ts'
import { ContendedColumns } from './contended.ts'
import { GpuShadow } from './gpu-shadow.ts'
import { digestOf, saltOf, SimMemory } from './memory.ts'
import type { Failure } from './operations/fail.ts'
import { ExpectedBeam } from './oracle-beams.ts'
import { Expected, Oracle } from './oracle.ts'
import { AskedPrompts } from './prompts.ts'
import { SimTier } from './tier.ts'

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
  offloads: number
  lost: number
  /** Prefixes that went to disk, and prompts for which some came back. */
  demotions: number
  fetches: number
  restarts: number
  /** Columns for which memory was refused, and those that were being brought back. */
  refusals: number
  inVain: number
}

/** Steps beyond its share of the work that a sequence may take. */
const DEADLINE_SLACK = 8

/** What beams may end with: too few places, regions or answers. */
const BEAM_ERRORS = new Set(['kv_memory_exhausted', 'invalid_request'])

/** Transfers, one after the other, that somebody waits for at most: also if each of them fails. */
const WAITS_MAX = 8

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
    offloads: 0,
    lost: 0,
    demotions: 0,
    fetches: 0,
    restarts: 0,
    refusals: 0,
    inVain: 0,
  }
  core!: EngineCore
  backend!: SimBackend
  memory!: SimMemory
  tier: SimTier | undefined
  private readonly parts: Parts
  private readonly oracle: Oracle
  private insides!: Insides
  private asked!: AskedPrompts
  /** Tenant and name of each pinned prefix. */
  readonly pinned = new Set<string>()
  /** Sequences whose pin was taken away before their first token, at the latest. */
  private readonly unpinned = new Set<number>()
  private readonly salts = new Map<string, number>()
  private readonly bySlot: (Sequence | undefined)[] = []
  private ids = 0
  /** Tokens that the sequences that have not ended may take, prompts and all. */
  private work = 0
  /** Steps in a row that did nothing although there are sequences. */
  private waited = 0
  private slownessMax = 1
  /** Steps that shortages may have cost those that were there. */
  private stepsShort = 0
  private wasDead = false
  private aborting = -1
  private refusing = -1
  /** What shall fail, and whether it has. */
  private armed: Failure | undefined

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
      const { beams } = drawn
      const sampling = beams ? drawn.sampling : { ...drawn.sampling, seed: drawn.sampling.seed + i }
      const request = { ...drawn, requestId: `request ${first}`, sampling }
      this.work += workOf(request)
      // Alone with a cached prefix that takes the last page, one begins once more without.
      const deadline = this.steps + 2 * this.work + this.expected.size + DEADLINE_SLACK
      const times = [this.steps, deadline] as const
      const expected = beams
        ? new ExpectedBeam(id, i, request, ...times, this.oracle)
        : new Expected(id, request, ...times, this.oracle)
      this.expected.set(id, expected)
      return request
    })
    const samplings = requests.map(({ sampling }) => sampling)
    this.core.submitChoices(ids, present(requests[0], 'a choice'), samplings)
    const taken = ids.every((id) => this.expected.has(id))
    assert(taken || drawn.pin !== undefined || drawn.beams, `request ${first} is not refused`)
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
      const key = `${tenant}: ${pin}`
      const early = this.pinning(key)
      const pinned = this.core.answer({ kind: 'unpin', tenant, id: pin })
      const known = this.pinned.delete(key)
      assert(known ? pinned : !pinned || early.length > 0, 'what is pinned can be unpinned')
      // What one of these has pinned, or is about to, is told with its first token.
      for (const { id } of early) this.unpinned.add(id)
    })
  }

  settle(): void {
    this.guard(() => {
      const ms = this.core.settle()
      assert(ms === undefined || ms >= 0, 'time to wait is not negative')
    })
  }

  failNext(what: Failure): void {
    this.armed = what
    if (what === 'launch' || what === 'collect') this.backend.fault = what
    if (what === 'pager' && this.tier) this.tier.disk.dead = true
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

  onFinish(
    id: number,
    reason: FinishReason,
    outputTokens: number,
    error?: LatticeError,
    score?: number,
  ): void {
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
      const { tenant, pin } = expected.request
      const pins = this.insides.cache?.pins.list ?? []
      // Its prompt may be in memory before its first token is told.
      if (this.config.ahead && pins.some((one) => one.tenant === tenant && one.id === pin)) {
        this.computed(expected)
      }
      this.coverage.aborted++
    } else if (reason === 'error') {
      const poisoned = this.backend.fault === 'nan' && error?.code === 'backend_failed'
      const unpinnable = expected.request.pin !== undefined && PIN_ERRORS.has(error?.code ?? '')
      const taken = this.config.contended && error?.code === 'gpu_memory_taken'
      const noBeams = expected.request.beams && BEAM_ERRORS.has(error?.code ?? '')
      assert(
        poisoned || unpinnable || noBeams || taken,
        `sequence ${id} ends without an error: ${error?.message}`,
      )
      expected.end(outputTokens)
      if (poisoned) this.computed(expected)
      this.coverage.failed++
    } else {
      expected.finish(reason, outputTokens, score)
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
      const dead = this.tier?.disk.dead ?? false
      // A step that is queued ahead is looked at when the next one is.
      assert(!dead || (this.config.ahead && !this.wasDead), 'an engine without a pager stops')
      this.wasDead = dead
      if (busy || this.backend.fault === 'nan') this.backend.fault = undefined
      this.checkAlive(busy)
    })
    this.check()
  }

  /** Lets everything end, time pass and every prefix go: nothing may be left. */
  finish(): void {
    this.armed = undefined
    this.backend.fault = undefined
    if (this.memory.contended) this.memory.contended.taken = 0
    while (this.expected.size > 0 || !this.core.idle) this.advance()
    this.nowMs += 1000
    this.advance()
    const { limitPages } = this.insides.regionTable
    assert(limitPages === this.config.kvPages, 'all memory may be used when all of it is back')
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
    this.memory.shadow?.close()
    const places = new Set([...(cache?.nodes() ?? [])].flatMap((node) => [...(node.places ?? [])]))
    const { ranges, shape } = this.config.layout
    const used = this.core.snapshot().tier?.usedBytes ?? 0
    assert(used === places.size * ranges * shape.pageBytes, 'only cached prefixes stay on disk')
    this.count()
  }

  checkSnapshot(): void {
    const { sequences, running, waiting, kv } = this.core.snapshot()
    const { slots, regions } = this.insides
    const beams = [...this.expected.values()].some(({ request }) => request.beams)
    assert(beams || sequences.length === this.expected.size, 'a snapshot has every sequence')
    assert(beams || running + waiting === sequences.length, 'a sequence runs or waits')
    assert(running <= slots.filter(({ state }) => state === 'held').length, 'who runs has a slot')
    let columns = 0
    for (const region of regions)
      region?.live.forEach((n, c) => (columns += +(n + region.cache[c]! > 0)))
    assert(kv.usedPages === columns * this.config.layout.ranges, 'a snapshot has every page')
    assert(kv.residentBytes <= kv.usedPages * kv.pageBytes, 'what is in memory is counted')
    checkMap(this.core.answer({ kind: 'map' }).map, regions)
  }

  /** Its prompt is in memory, or was: it is pinned if it asked for that. */
  private computed({ id, request: { tenant, pin } }: Expected): void {
    if (pin === undefined) return
    const pins = this.insides.cache?.pins.list ?? []
    const isPinned = () => pins.some((one) => one.tenant === tenant && one.id === pin)
    if (!this.unpinned.has(id) || isPinned()) this.pinned.add(`${tenant}: ${pin}`)
  }

  private check(): void {
    this.core.check()
    const pinned = (this.insides.cache?.pins.list ?? []).map(({ tenant, id }) => `${tenant}: ${id}`)
    const known = pinned.filter((pin) => this.pinned.has(pin))
    assert(known.length === this.pinned.size, 'what is pinned stays')
    assert(
      pinned.every((pin) => this.pinned.has(pin) || this.pinning(pin).length > 0),
      'nothing else is pinned',
    )
    const { memory, insides } = this
    memory.checkCounted(insides.regions)
    insides.slots.forEach(({ state, region, shared }, slot) => {
      if (state === 'held') memory.checkMapped(slot, region, shared)
    })
    for (const [tenant, root] of insides.roots) this.checkNode(root, this.saltOf(tenant))
  }

  /** Of steps that are queued ahead, a prompt is in memory before its first token is told. */
  private pinning(pin: string): Expected[] {
    if (!this.config.ahead) return []
    return [...this.expected.values()].filter(
      ({ request, outputTokens }) =>
        outputTokens === 0 && `${request.tenant}: ${request.pin}` === pin,
    )
  }

  /** Somebody gets on, and whoever came first ends in the time that the work until then takes. */
  private checkAlive(busy: boolean): void {
    const { slowness = 1, failed = 0 } = this.tier?.disk ?? {}
    this.slownessMax = Math.max(this.slownessMax, slowness)
    const { limitPages } = this.insides.regionTable
    // Who waits for another process's memory waits as long as that has it, and begins again.
    const short = limitPages < this.config.kvPages
    if (short) this.stepsShort += 1 + this.config.layout.shape.maxTokens
    this.waited = busy || short || this.expected.size === 0 ? 0 : this.waited + 1
    const wait = this.tier ? WAITS_MAX * this.slownessMax + 2 : 0
    assert(this.waited <= wait, 'an engine with sequences has something to do')
    // What fails to come back is computed again.
    const again = failed * (this.config.layout.shape.maxTokens + wait) + this.stepsShort
    for (const { id, deadline, since } of this.expected.values()) {
      const steps = since + (deadline - since) * (1 + wait) + again
      assert(this.steps <= steps, `sequence ${id} ends in the time that its work takes`)
      // Who comes later has more time.
      break
    }
  }

  /** What is cached is in memory, as its tenant's tokens left it. */
  private checkNode(node: PrefixNode, before: number): void {
    const { region, coming, from, tokens, children } = node
    const hash =
      region >= 0 && !coming
        ? this.memory.checkRows(region, from, tokens, before)
        : tokens.reduce(extendHash, before)
    for (const child of children.values()) this.checkNode(child, hash)
  }

  /** Runs the engine; if what was injected stops it, its clients are told and a new one starts. */
  guard(act: () => void): void {
    try {
      act()
    } catch (thrown) {
      if (!isInjected(thrown)) throw thrown
      // Of steps that are queued ahead, what was injected in the last one is met in the next.
      const injected = this.armed !== undefined || this.tier?.disk.dead
      assert(injected, 'an engine stops for the error that was injected')
      this.coverage.restarts++
      this.count()
      this.start()
    }
  }

  private start(): void {
    const { config, parts } = this
    const { layout, slots, regions, maxSequences, kvPages, prefixPages, spansMax } = config
    this.memory = new parts.memory(layout, slots, regions)
    if (config.gpu) this.memory.shadow = new GpuShadow(layout, slots, regions, kvPages)
    this.tier = config.tierColumns > 0 ? new SimTier(this.memory, config.tierColumns) : undefined
    if (this.tier) this.memory.tier = this.tier
    this.slownessMax = 1
    this.waited = 0
    this.wasDead = false
    if (config.contended) this.memory.contended = new ContendedColumns(layout, kvPages)
    this.backend = new parts.backend(config, this.memory)
    const { prefixEviction, prefixOutput, greedy, comeBack } = config
    const options: CoreOptions = {
      maxSequences,
      kvPages,
      prefixPages,
      prefixEviction,
      prefixOutput,
      greedy,
      comeBack,
      watermarks: config.watermarks,
    }
    this.core = new EngineCore(this.backend, options, this, () => this.nowMs)
    this.insides = insidesOf(this.core)
    this.insides.sharing.spansMax = spansMax
    this.asked = new AskedPrompts()
    this.pinned.clear()
    this.unpinned.clear()
    this.expected.clear()
    this.work = 0
    this.aborting = -1
    this.armed = undefined
    this.memory.onMove = (what) => {
      if (what === 'map') this.coverage.maps++
      if (this.armed === what) throw new LatticeError('os_call_failed', `injected at ${what}`)
    }
    this.backend.onLaunch = () => {
      if (this.armed === 'pager in a step' && this.tier) {
        this.tier.disk.dead = true
        this.backend.blind = true
      }
      for (const sequence of this.insides.running) {
        this.bySlot[sequence.slot] = sequence
        this.memory.salts[sequence.slot] = this.saltOf(sequence.request.tenant)
      }
    }
    this.backend.onRead = (slot, tokens, digest) => {
      const sequence = present(this.bySlot[slot], 'a sequence')
      const { id, unit, request } = sequence
      return () => {
        // It may have ended with the step before, or been aborted meanwhile.
        if (config.ahead && !this.expected.has(id)) return
        const right = unit
          ? digestOf(this.saltOf(request.tenant), tokensOf(sequence), tokens)
          : this.of(id).digest
        assert(
          digest === right,
          `the ${tokens} tokens that slot ${slot} reads are those of sequence ${id}`,
        )
      }
    }
    parts.tamper(this.core)
  }

  private count(): void {
    const { preemptions, tier } = this.core.snapshot()
    this.coverage.preemptions += preemptions
    this.coverage.offloads += tier?.offloads ?? 0
    this.coverage.lost += tier?.lost ?? 0
    this.coverage.demotions += tier?.demotions ?? 0
    this.coverage.fetches += tier?.fetches ?? 0
    this.coverage.refusals += this.memory.contended?.refusals ?? 0
    this.coverage.inVain += this.memory.broughtBackInVain
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
