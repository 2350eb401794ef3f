// Owns the cached prefixes: which nodes of the tree (prefix-tree.ts) are in memory, in which region
// the keys and values of their tokens lie there, and which go first. A prefix may end at any token.
// After SGLang's RadixAttention (Zheng et al. 2024); the pages are shared by mapping, never copied.
//
//   tenant ─ "You are a helpful …" ─┬─ "Translate: …"      region 2
//                region 0           └─ "Summarise: …" ─ …  region 5

import { assert, present } from '../assert.ts'
import { EVICTION_DEFAULT, type EvictionName, EVICTION_POLICIES } from './eviction.ts'
import { columnsOf, EvictionQueue } from './eviction-queue.ts'
import { tokensIn } from './layout.ts'
import type { PlaceTable } from './places.ts'
import { type Pin, pinLimitPages, PinTable } from './pins.ts'
import { addSpan, commonLength, mayGo, type PrefixNode } from './prefix-node.ts'
import { PrefixTree } from './prefix-tree.ts'
import { type KvColumns, type KvSpan, type RegionTable, spannedTokens } from './regions.ts'
import type { WatchTable } from './watches.ts'

export interface PrefixCacheOptions {
  /** 'cost' unless told. */
  eviction?: EvictionName
  /** Milliseconds that never go back; for what is shown only. */
  now?: () => number
  /** What is kept outside of memory has places there. */
  places?: PlaceTable
  /** Told of each end that is forgotten, or went out of memory, with the pages that came back. */
  onGone?: (kind: 'evict' | 'demote', pages: number) => void
}

/** Whoever takes prefixes out of memory in its own time, so that they need not be forgotten. */
export interface Outlet {
  /** Begins to take out so many pages; false if nothing is on its way out. */
  drain(pages: number): boolean
  /** Pages on their way out; the cache is told at the end of each (`keepBudget`). */
  readonly leavingPages: number
}

export class PrefixCache {
  /** None unless set. */
  outlet: Outlet | undefined
  evictions = 0
  /** Those that went out of memory, and are cached still. */
  demotions = 0
  readonly pins: PinTable
  private readonly regions: RegionTable
  readonly budgetPages: number
  private readonly queue: EvictionQueue<PrefixNode>
  private readonly now: () => number
  private readonly places: PlaceTable | undefined
  private readonly onGone: (kind: 'evict' | 'demote', pages: number) => void
  private readonly tree: PrefixTree
  readonly watches: WatchTable
  private clock = 0

  /** @param budgetPages that cached prefixes may refer to, at most */
  constructor(regions: RegionTable, budgetPages: number, options: PrefixCacheOptions = {}) {
    this.regions = regions
    this.budgetPages = budgetPages
    this.now = options.now ?? (() => 0)
    this.places = options.places
    this.onGone = options.onGone ?? (() => {})
    this.queue = new EvictionQueue(regions, EVICTION_POLICIES[options.eviction ?? EVICTION_DEFAULT])
    this.pins = new PinTable(regions, pinLimitPages(regions, budgetPages))
    this.tree = new PrefixTree(regions, options.places, (upper, lower) => {
      this.queue.revalue(upper)
      this.queue.revalue(lower)
    })
    this.watches = this.tree.watches
  }

  /** Where the longest prefix of the first `length` tokens lies that is cached in memory. */
  lookup(tenant: string, tokens: Int32Array, length: number): KvSpan[] {
    const spans: KvSpan[] = []
    let node = this.tree.roots.get(tenant)
    let at = 0
    this.clock++
    while (node) {
      this.touch(node)
      const child: PrefixNode | undefined =
        at < length ? node.children.get(present(tokens[at], 'a token')) : undefined
      if (!child) break
      const common = commonLength(child.tokens, tokens.subarray(at, length))
      this.touch(child)
      if (child.region < 0 || child.coming) break
      addSpan(spans, { region: child.region, from: at, to: at + common })
      at += common
      node = common === child.tokens.length ? child : undefined
    }
    return spans
  }

  /**
   * Takes in a sequence's tokens, which lie in `spans`; what is cached already stays as it is. Of
   * more tokens than the budget holds, the first ones: else they would drive out all others.
   */
  insert(tenant: string, tokens: Int32Array, spans: readonly KvSpan[]): void {
    const room = this.budgetPages - this.pins.pages
    const length = Math.min(tokens.length, tokensIn(this.regions.layout, room))
    this.clock++
    let node = this.tree.root(tenant)
    this.touch(node)
    let at = 0
    while (at < length) {
      const child = node.children.get(present(tokens[at], 'a token'))
      if (!child) break
      if (child.coming) return void this.keepBudget()
      const span = child.region < 0 ? spans.find(({ to }) => to > at) : undefined
      const end = Math.min(length, span?.to ?? length)
      const common = commonLength(child.tokens, tokens.subarray(at, end))
      node = common === child.tokens.length ? child : this.tree.split(child, common)
      // What is outside of memory was computed again meanwhile.
      if (span) this.warmUp(node, span.region)
      node.uses++
      this.touch(node)
      at += common
    }
    for (const { region, from, to } of spans) {
      const start = Math.max(at, from)
      const end = Math.min(to, length)
      if (start >= end) continue
      node = this.add(node, tokens.slice(start, end), region)
    }
    this.keepBudget()
    this.tree.forgetIfEmpty(this.tree.root(tenant))
  }

  /**
   * Takes in what is outside of memory, where its columns have these places.
   * @returns the node at which it ends
   */
  restore(tenant: string, tokens: Int32Array, places: Uint32Array): PrefixNode {
    let node = this.tree.root(tenant)
    let at = 0
    while (at < tokens.length) {
      const child = node.children.get(present(tokens[at], 'a token'))
      if (!child) break
      const common = commonLength(child.tokens, tokens.subarray(at))
      node = common === child.tokens.length ? child : this.tree.split(child, common)
      at += common
    }
    if (at === tokens.length) return node
    const end = this.tree.append(node, tokens.slice(at), -1)
    const { first, end: last } = columnsOf(this.regions, end)
    end.places = places.slice(first, last)
    this.places?.claim(end.places)
    return end
  }

  /**
   * Takes ends of prefixes out of memory, those worth least, until memory comes back: they are
   * forgotten unless they are outside of memory too. False, with nothing changed, if none would
   * come back: sequences use whatever is cached, or it is pinned.
   */
  evict(): boolean {
    if (this.regions.evictablePages === 0) return false
    const before = this.regions.usedPages
    while (this.regions.usedPages === before) this.yield(this.queue.firstToFree())
    return true
  }

  /** What `evict` would take out of memory first. */
  get coldest(): PrefixNode | undefined {
    return this.regions.evictablePages === 0 ? undefined : this.queue.firstToFree()
  }

  /** Takes out of memory what is in its places too. */
  demote(node: PrefixNode): void {
    if (this.queue.has(node)) this.queue.remove(node)
    this.queue.went(node)
    const before = this.regions.usedPages
    this.coolDown(node)
    this.demotions++
    this.onGone('demote', before - this.regions.usedPages)
  }

  /** Keeps a node from going, whatever follows it, until it is let go. */
  hold(node: PrefixNode): void {
    node.pins++
    if (this.queue.has(node)) this.queue.remove(node)
  }

  letGo(node: PrefixNode): void {
    node.pins--
    if (mayGo(node)) this.queue.add(node)
  }

  /** The end of what is in memory, or was coming there, is only in its places from now on. */
  coolDown(node: PrefixNode): void {
    assert(node.region >= 0 && node.places && node.warm === 0, 'the end of what is in memory goes')
    const parent = present(node.parent, 'a parent')
    this.regions.drop(columnsOf(this.regions, node), 'cache')
    node.region = -1
    node.coming = false
    parent.warm--
    if (mayGo(parent)) this.queue.add(parent)
  }

  /** What was coming is there. */
  arrived(node: PrefixNode): void {
    node.coming = false
    if (mayGo(node)) this.queue.add(node)
  }

  /** A node that is out has its content in `region`, or will when it is no longer `coming`. */
  warmUp(node: PrefixNode, region: number, coming = false): void {
    const parent = present(node.parent, 'a parent')
    assert(node.region < 0, 'what is brought back was out')
    node.region = region
    node.coming = coming
    parent.warm++
    if (this.queue.has(parent)) this.queue.remove(parent)
    this.regions.hold(columnsOf(this.regions, node), 'cache')
    if (mayGo(node)) this.queue.add(node)
  }

  /**
   * The nodes that follow what is in memory of the first `length` tokens, outside of memory, and
   * 'coming' if they are on their way. The last is made to end where these tokens leave it.
   */
  cold(tenant: string, tokens: Int32Array, length: number): PrefixNode[] | 'coming' {
    const found: PrefixNode[] = []
    let node = this.tree.roots.get(tenant)
    for (let at = 0; node && at < length;) {
      const child: PrefixNode | undefined = node.children.get(present(tokens[at], 'a token'))
      if (!child) break
      if (child.coming) return 'coming'
      const common = commonLength(child.tokens, tokens.subarray(at, length))
      const whole = common === child.tokens.length
      node = whole || child.region >= 0 ? child : this.tree.split(child, common)
      if (node.region < 0) found.push(node)
      if (!whole) break
      at += common
    }
    return found
  }

  /** Forgets a node and all that follows it. */
  forgetAll(node: PrefixNode): void {
    for (const child of node.children.values()) this.forgetAll(child)
    this.forget(node)
  }

  /**
   * Keeps a prefix that was taken in until it is unpinned, whatever else needs memory. Its pages
   * count as used by a sequence. Once more for the same tokens changes nothing.
   * @throws LatticeError `prefix_memory_exhausted`, with nothing changed
   */
  pin(tenant: string, id: string, tokens: Int32Array): void {
    if (this.pins.find(tenant, id)) return
    const spans = this.lookup(tenant, tokens, tokens.length)
    const whole = spannedTokens(spans) === tokens.length
    const pin = { tenant, id, tokens, spans, pinnedMs: this.now(), usesBefore: 0 }
    this.pins.add(pin, whole)
    const node = this.tree.end(tenant, tokens)
    node.pins++
    pin.usesBefore = node.uses
    if (this.queue.has(node)) this.queue.remove(node)
  }

  /** False if the tenant has no such pinned prefix. From now on it is a cached one. */
  unpin(tenant: string, id: string): boolean {
    const pin = this.pins.find(tenant, id)
    if (!pin) return false
    const node = this.tree.end(tenant, pin.tokens)
    this.pins.remove(pin)
    node.pins--
    if (mayGo(node)) this.queue.add(node)
    return true
  }

  /** Prompts that a pinned prefix served since it was pinned. */
  usesOf({ tenant, tokens, usesBefore }: Pin): number {
    return this.tree.end(tenant, tokens).uses - usesBefore
  }

  /** All of them, parents before children. */
  nodes(): Generator<PrefixNode> {
    return this.tree.nodes()
  }

  /** What the nodes hold. */
  *holds(): Generator<KvColumns> {
    for (const node of this.nodes()) if (node.region >= 0) yield columnsOf(this.regions, node)
  }

  /** Throws if the tree contradicts itself. */
  check(): void {
    this.queue.check()
    let ends = 0
    const visit = (node: PrefixNode): void => {
      const warm = [...node.children.values()].filter(({ region }) => region >= 0).length
      assert(node.warm === warm, 'a node knows how many that follow are in memory')
      assert(warm === 0 || node.region >= 0 || !node.parent, 'what leads to memory is in memory')
      assert(node.region >= 0 || node.places || !node.parent, 'what is not in memory has places')
      assert(this.queue.has(node) === mayGo(node), 'ends that are not pinned can go, only they')
      if (mayGo(node)) ends++
      for (const [token, child] of node.children) {
        assert(child.parent === node && child.tokens[0] === token, 'a child knows its place')
        assert(child.from === node.from + node.tokens.length, 'positions go on without gaps')
        assert(child.usedAt <= node.usedAt, 'who uses a child uses its parent')
        visit(child)
      }
    }
    for (const root of this.tree.roots.values()) visit(root)
    const coming = [...this.nodes()].some((node) => node.coming)
    const within = this.regions.cachedPages <= this.budgetPages
    const leaving = (this.outlet?.leavingPages ?? 0) > 0
    assert(within || coming || leaving, 'cached pages keep to their budget')
    assert(this.queue.size === ends, 'nothing is queued that has gone')
    this.pins.check()
    for (const pin of this.pins.list) {
      assert(this.tree.end(pin.tenant, pin.tokens).pins > 0, 'a pinned prefix stays')
    }
  }

  /**
   * Makes room in the budget, for `more` pages too, as far as it can: what is coming, and what
   * leads to it, stays until it is there. Nothing is forgotten while something is on its way out:
   * what is still too much then follows it.
   * @returns whether there is, or will be, room
   */
  keepBudget(more = 0): boolean {
    for (;;) {
      const over = this.regions.cachedPages + more - this.budgetPages
      if (over <= 0 || this.outlet?.drain(over)) return true
      if (!this.queue.first) return false
      this.yield(this.queue.first)
    }
  }

  /** The end of what is in memory goes from there. */
  private yield(end: PrefixNode): void {
    if (end.places) this.demote(end)
    else this.forgetAll(end)
  }

  private forget(leaf: PrefixNode): void {
    const parent = present(leaf.parent, 'a parent')
    const before = this.regions.usedPages
    if (this.queue.has(leaf)) {
      this.queue.remove(leaf)
      this.queue.went(leaf)
    }
    parent.children.delete(present(leaf.tokens[0], 'a token'))
    if (leaf.places) this.places?.give(leaf.places)
    leaf.places = undefined
    if (leaf.region >= 0) {
      parent.warm--
      this.regions.drop(columnsOf(this.regions, leaf), 'cache')
    }
    leaf.gone = true
    this.watches.went(leaf)
    this.evictions++
    this.onGone('evict', before - this.regions.usedPages)
    if (!parent.parent) this.tree.forgetIfEmpty(parent)
    else if (mayGo(parent) && !this.queue.has(parent)) this.queue.add(parent)
  }

  private add(parent: PrefixNode, tokens: Int32Array, region: number): PrefixNode {
    const node = this.tree.append(parent, tokens, region)
    if (this.queue.has(parent)) this.queue.remove(parent)
    parent.warm++
    this.regions.hold(columnsOf(this.regions, node), 'cache')
    this.touch(node)
    this.queue.add(node)
    return node
  }

  private touch(node: PrefixNode): void {
    node.usedAt = this.clock
    node.usedMs = this.now()
    if (node.parent) this.queue.used(node)
  }
}
