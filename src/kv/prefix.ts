// Owns the cached prefixes: a radix tree over tokens for each tenant, whose nodes say in which
// region the keys and values of their tokens lie. A prefix may end at any token. After SGLang's
// RadixAttention (Zheng et al. 2024); the pages are shared by mapping, never copied out.
//
//   tenant ─ "You are a helpful …" ─┬─ "Translate: …"      region 2
//                region 0           └─ "Summarise: …" ─ …  region 5

import { assert, present } from '../assert.ts'
import { type KvColumns, type KvSpan, type RegionTable, spannedColumns } from './regions.ts'

interface Node {
  parent: Node | undefined
  /** What leads here from the parent. */
  tokens: Int32Array
  /** Position of the first of them. */
  from: number
  region: number
  /** By their first token. */
  children: Map<number, Node>
  /** Of the cache's own clock, which ticks with every use. */
  usedAt: number
}

export class PrefixCache {
  private readonly regions: RegionTable
  private readonly budgetPages: number
  /** One tenant never sees another's prefixes: not even by how fast an answer comes. */
  private readonly roots = new Map<string, Node>()
  private clock = 0

  /** @param budgetPages that cached prefixes may refer to, at most */
  constructor(regions: RegionTable, budgetPages: number) {
    this.regions = regions
    this.budgetPages = budgetPages
  }

  /** Where the longest cached prefix of the first `length` tokens lies. */
  lookup(tenant: string, tokens: Int32Array, length: number): KvSpan[] {
    const spans: KvSpan[] = []
    let node = this.roots.get(tenant)
    let at = 0
    this.clock++
    while (node) {
      node.usedAt = this.clock
      const child: Node | undefined =
        at < length ? node.children.get(present(tokens[at], 'a token')) : undefined
      if (!child) break
      const common = commonLength(child.tokens, tokens.subarray(at, length))
      child.usedAt = this.clock
      addSpan(spans, { region: child.region, from: at, to: at + common })
      at += common
      node = common === child.tokens.length ? child : undefined
    }
    return spans
  }

  /** Takes in a sequence's tokens, which lie in `spans`; what is cached already stays as it is. */
  insert(tenant: string, tokens: Int32Array, spans: readonly KvSpan[]): void {
    let node = this.root(tenant)
    let at = 0
    node.usedAt = ++this.clock
    while (at < tokens.length) {
      const child = node.children.get(present(tokens[at], 'a token'))
      if (!child) break
      const common = commonLength(child.tokens, tokens.subarray(at))
      node = common === child.tokens.length ? child : this.split(child, common)
      node.usedAt = this.clock
      at += common
    }
    for (const { region, from, to } of spans) {
      if (to <= at) continue
      const start = Math.max(at, from)
      node = this.add(node, tokens.slice(start, to), start, region)
    }
    while (this.regions.cachedPages > this.budgetPages) this.evict()
    if (node.children.size === 0 && !node.parent) this.roots.delete(tenant)
  }

  /** Forgets the end of the prefix that was not used for longest. False if there is none. */
  evict(): boolean {
    let oldest: Node | undefined
    for (const root of this.roots.values()) {
      for (const leaf of leaves(root)) {
        if (leaf.parent && (!oldest || leaf.usedAt < oldest.usedAt)) oldest = leaf
      }
    }
    if (!oldest) return false
    const parent = present(oldest.parent, 'a parent')
    parent.children.delete(present(oldest.tokens[0], 'a token'))
    this.regions.drop(this.columns(oldest), 'cache')
    if (!parent.parent && parent.children.size === 0) {
      for (const [tenant, root] of this.roots) if (root === parent) this.roots.delete(tenant)
    }
    return true
  }

  /** What the nodes hold. */
  *holds(): Generator<KvColumns> {
    const nodes = [...this.roots.values()]
    for (let node = nodes.pop(); node; node = nodes.pop()) {
      nodes.push(...node.children.values())
      if (node.parent) yield this.columns(node)
    }
  }

  /** Throws if the tree contradicts itself. */
  check(): void {
    assert(this.regions.cachedPages <= this.budgetPages, 'cached pages keep to their budget')
    const visit = (node: Node): void => {
      for (const [token, child] of node.children) {
        assert(child.parent === node && child.tokens[0] === token, 'a child knows its place')
        assert(child.from === node.from + node.tokens.length, 'positions go on without gaps')
        assert(child.usedAt <= node.usedAt, 'who uses a child uses its parent')
        visit(child)
      }
    }
    for (const root of this.roots.values()) visit(root)
  }

  private root(tenant: string): Node {
    let root = this.roots.get(tenant)
    if (!root) {
      const tokens = new Int32Array(0)
      root = { parent: undefined, tokens, from: 0, region: -1, children: new Map(), usedAt: 0 }
      this.roots.set(tenant, root)
    }
    return root
  }

  private add(parent: Node, tokens: Int32Array, from: number, region: number): Node {
    const node = { parent, tokens, from, region, children: new Map(), usedAt: this.clock }
    parent.children.set(present(tokens[0], 'a token'), node)
    this.regions.hold(this.columns(node), 'cache')
    return node
  }

  /** Puts a node of its own above a node for its first `count` tokens. */
  private split(node: Node, count: number): Node {
    const before = this.columns(node)
    const upper: Node = { ...node, tokens: node.tokens.slice(0, count), children: new Map() }
    upper.parent!.children.set(present(node.tokens[0], 'a token'), upper)
    node.parent = upper
    node.tokens = node.tokens.slice(count)
    node.from += count
    upper.children.set(present(node.tokens[0], 'a token'), node)
    this.regions.hold(this.columns(upper), 'cache')
    this.regions.hold(this.columns(node), 'cache')
    this.regions.drop(before, 'cache')
    return upper
  }

  private columns({ region, from, tokens }: Node): KvColumns {
    const span = { region, from, to: from + tokens.length }
    return present(spannedColumns(this.regions.layout, [span])[0], 'columns')
  }
}

function* leaves(node: Node): Generator<Node> {
  if (node.children.size === 0) yield node
  for (const child of node.children.values()) yield* leaves(child)
}

function addSpan(spans: KvSpan[], span: KvSpan): void {
  const last = spans.at(-1)
  if (last?.region === span.region) last.to = span.to
  else spans.push(span)
}

function commonLength(a: Int32Array, b: Int32Array): number {
  const length = Math.min(a.length, b.length)
  let i = 0
  while (i < length && a[i] === b[i]) i++
  return i
}
