// Owns the simulator's look into an engine core's private parts: who is in which slot, what is
// counted, what is cached. One place, so that a change inside breaks here and nowhere else.

import { present } from '../../src/assert.ts'
import type { EngineCore } from '../../src/engine/core.ts'
import type { Sequence } from '../../src/engine/sequence.ts'
import type { PrefixCache } from '../../src/kv/prefix.ts'
import type { PrefixNode } from '../../src/kv/prefix-node.ts'
import type { KvSpan, RegionTable } from '../../src/kv/regions.ts'
import type { SlotTable } from '../../src/kv/slots.ts'

export interface Insides {
  running: readonly Sequence[]
  slotTable: SlotTable
  slots: readonly { state: 'free' | 'held' | 'warm'; region: number; shared: readonly KvSpan[] }[]
  regionTable: RegionTable
  regions: readonly ({ live: Uint16Array; cache: Uint16Array } | undefined)[]
  cache: PrefixCache | undefined
  /** By tenant. */
  roots: ReadonlyMap<string, PrefixNode>
  sharing: { spansMax: number }
}

export function insidesOf(core: EngineCore): Insides {
  const slotTable = part<SlotTable>(core, 'slots')
  const regionTable = slotTable.regions
  const sharing = part(core, 'sharing')
  const cache = (sharing as { cache?: PrefixCache }).cache
  return {
    running: part(part(core, 'scheduler'), 'running'),
    slotTable,
    slots: part(slotTable, 'slots'),
    regionTable,
    regions: part(regionTable, 'regions'),
    cache,
    roots: cache ? part(part(cache, 'tree'), 'roots') : new Map(),
    sharing: part(sharing, 'options'),
  }
}

/** What a sequence has in memory, when its next token is about to be chosen. */
export function tokensOf(sequence: Sequence): number[] {
  const { tokens, length, request, unit } = sequence
  if (!unit) return [...tokens.subarray(0, length)]
  const beams = part<{ node: BeamNode | undefined }[]>(part(unit, 'search'), 'running')
  const output: number[] = []
  for (let node = beams[unit.members.indexOf(sequence)]?.node; node; node = node.parent) {
    output.unshift(node.token)
  }
  return [...request.prompt, ...output]
}

interface BeamNode {
  parent: BeamNode | undefined
  token: number
}

function part<T extends object = object>(of: object, name: string): T {
  return present((of as Record<string, T | undefined>)[name], `the part ${name}`)
}
