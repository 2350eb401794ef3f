// Owns the shape of the prefix cache: a radix tree over tokens for each tenant, whose nodes are cut
// where prompts part. One tenant never sees another's: not even by how fast an answer comes.

import { present } from '../assert.ts'
import { columnsOf } from './eviction-queue.ts'
import type { PlaceTable } from './places.ts'
import type { PrefixNode } from './prefix-node.ts'
import type { RegionTable } from './regions.ts'
import { WatchTable } from './watches.ts'

export class PrefixTree {
  readonly roots = new Map<string, PrefixNode>()
  readonly watches = new WatchTable(this.roots)
  private readonly regions: RegionTable
  private readonly places: PlaceTable | undefined
  private readonly onSplit: (upper: PrefixNode, lower: PrefixNode) => void
  private nextId = 1

  /** @param onSplit told of each node that was cut while in memory */
  constructor(
    regions: RegionTable,
    places: PlaceTable | undefined,
    onSplit: (upper: PrefixNode, lower: PrefixNode) => void,
  ) {
    this.regions = regions
    this.places = places
    this.onSplit = onSplit
  }

  /** A tenant's, made if need be. */
  root(tenant: string): PrefixNode {
    let root = this.roots.get(tenant)
    if (!root) {
      root = this.node(undefined, tenant, new Int32Array(0), 0, -1)
      this.roots.set(tenant, root)
    }
    return root
  }

  /** Lets go of a root that nothing follows. */
  forgetIfEmpty(root: PrefixNode): void {
    if (root.children.size === 0) this.roots.delete(root.tenant)
  }

  /** Lets a new node follow another one; whether anybody holds its columns is the caller's. */
  append(parent: PrefixNode, tokens: Int32Array, region: number): PrefixNode {
    const from = parent.from + parent.tokens.length
    const node = this.node(parent, parent.tenant, tokens, from, region)
    parent.children.set(present(tokens[0], 'a token'), node)
    return node
  }

  /** Puts a node of its own above a node for its first `count` tokens. */
  split(node: PrefixNode, count: number): PrefixNode {
    const before = columnsOf(this.regions, node)
    const { parent, tenant, from, region, uses, usedAt, usedMs, base } = node
    const upper = this.node(parent, tenant, node.tokens.slice(0, count), from, region)
    Object.assign(upper, { uses, usedAt, usedMs, base })
    upper.parent!.children.set(present(node.tokens[0], 'a token'), upper)
    node.parent = upper
    node.tokens = node.tokens.slice(count)
    node.from += count
    this.watches.split(upper, node)
    upper.children.set(present(node.tokens[0], 'a token'), node)
    if (node.places) this.splitPlaces(upper, node, node.places)
    if (region < 0) return upper
    upper.warm = 1
    this.regions.hold(columnsOf(this.regions, upper), 'cache')
    this.regions.hold(columnsOf(this.regions, node), 'cache')
    this.regions.drop(before, 'cache')
    this.onSplit(upper, node)
    return upper
  }

  /** The node at which these tokens, all of them cached, end; one is made to if need be. */
  end(tenant: string, tokens: Int32Array): PrefixNode {
    let node = present(this.roots.get(tenant), "a tenant's prefixes")
    while (node.from + node.tokens.length < tokens.length) {
      const at = node.from + node.tokens.length
      const child = present(node.children.get(present(tokens[at], 'a token')), 'a cached prefix')
      const count = tokens.length - at
      node = child.tokens.length > count ? this.split(child, count) : child
    }
    return node
  }

  /** All of them but the roots, parents before children. */
  *nodes(): Generator<PrefixNode> {
    const visit = function* (node: PrefixNode): Generator<PrefixNode> {
      if (node.parent) yield node
      for (const child of node.children.values()) yield* visit(child)
    }
    for (const root of this.roots.values()) yield* visit(root)
  }

  /** Columns of a group that both have bytes of have places that both hold. */
  private splitPlaces(upper: PrefixNode, lower: PrefixNode, places: Uint32Array): void {
    const above = columnsOf(this.regions, upper)
    const below = columnsOf(this.regions, lower)
    upper.places = places.slice(0, above.end - above.first)
    lower.places = places.slice(below.first - above.first)
    const shared = lower.places.subarray(0, Math.max(0, above.end - below.first))
    for (const place of shared) this.places?.share(place)
  }

  private node(
    parent: PrefixNode | undefined,
    tenant: string,
    tokens: Int32Array,
    from: number,
    region: number,
  ): PrefixNode {
    return {
      id: this.nextId++,
      parent,
      tenant,
      tokens,
      from,
      region,
      children: new Map(),
      usedAt: 0,
      usedMs: 0,
      uses: 1,
      base: 0,
      value: 0,
      heapIndex: -1,
      pins: 0,
      places: undefined,
      coming: false,
      warm: 0,
      gone: false,
      watches: [],
    }
  }
}
