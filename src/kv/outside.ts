// Owns the map of KV outside of memory as it is shown: for every place in use who has what there,
// whether memory has it too, and since when nobody used it.

import type { PlaceTable } from './places.ts'
import type { PrefixCache } from './prefix.ts'
import type { KvColumns } from './regions.ts'
import type { Image } from './image.ts'

/** All that is outside of memory or on its way, prefixes that the cache knows excepted. */
export interface Outside {
  places: PlaceTable
  /** Where a place lies. */
  levelOf: (place: number) => Level
  /** What sequences that made room have there. */
  images: Iterable<Image>
  /** Columns in memory that wait for a transfer; the places, if they are written there. */
  moving: ReadonlyMap<KvColumns, Uint32Array | undefined>
}

/** host: in memory of the host, beside a GPU's own; disk: in a file. */
export type Level = 'host' | 'disk'

/**
 * cold: a cached prefix, offloaded: a sequence that had to make room, neither of which is in
 * memory; copy: memory has it as well; moving: on its way to disk or from it.
 */
export type PlaceState = 'cold' | 'offloaded' | 'copy' | 'moving'

/** Places [first, end), a column of pages each: all in the same state. */
export interface KvPlaceRun {
  tier: Level
  first: number
  end: number
  state: PlaceState
  /** Ids of the sequences that refer to it. */
  sequences: number[]
  /** Ids of the prefixes that refer to it. */
  prefixes: number[]
  /** Holds on each place. */
  references: number
  /** Since it was last used; 0 while it is on its way. */
  ageMs: number
}

export interface KvOutside {
  capacityPages: number
  usedPages: number
  /** Of the used pages, how many are in each state. */
  pages: Record<PlaceState, number>
  runs: KvPlaceRun[]
}

interface Owner {
  state: PlaceState
  sequence?: number
  prefix?: number
  ageMs: number
}

type Ownership = readonly [places: Uint32Array, owner: Owner]

/** What a place is shown as if it is more than one thing: the first of these. */
const STATES = ['moving', 'offloaded', 'cold', 'copy'] as const

/** @param columnPages pages of a column, which a place holds */
export function outsideMap(
  outside: Outside,
  cache: PrefixCache | undefined,
  sequences: readonly { id: number; image?: Image | undefined }[],
  columnPages: number,
  nowMs: number,
): KvOutside {
  const byPlace = new Map<number, Owner[]>()
  for (const [places, owner] of ownerships(outside, cache, sequences, nowMs)) {
    for (const place of places) {
      const owners = byPlace.get(place)
      if (owners) owners.push(owner)
      else byPlace.set(place, [owner])
    }
  }
  const { levelOf } = outside
  const runs: KvPlaceRun[] = []
  const pages = { cold: 0, offloaded: 0, copy: 0, moving: 0 }
  let before: readonly Owner[] = []
  for (const [place, owners] of [...byPlace].toSorted(([a], [b]) => a - b)) {
    const last = runs.at(-1)
    const tier = levelOf(place)
    if (last?.end === place && last.tier === tier && sameOwners(owners, before)) last.end++
    else runs.push(runOf(place, tier, owners))
    pages[runs.at(-1)!.state] += columnPages
    before = owners
  }
  const { capacity, used } = outside.places
  return { capacityPages: capacity * columnPages, usedPages: used * columnPages, pages, runs }
}

function* ownerships(
  { images, moving }: Outside,
  cache: PrefixCache | undefined,
  sequences: readonly { id: number; image?: Image | undefined }[],
  nowMs: number,
): Generator<Ownership> {
  const byImage = new Map(sequences.map(({ id, image }) => [image, id]))
  for (const image of images) {
    const sequence = byImage.get(image)
    const out = image.state === 'out'
    const shown = out
      ? ({ state: 'offloaded', ageMs: nowMs - image.sinceMs } as const)
      : ({ state: 'moving', ageMs: 0 } as const)
    yield [image.places, { ...shown, ...(sequence !== undefined && { sequence }) }]
  }
  for (const places of moving.values()) if (places) yield [places, { state: 'moving', ageMs: 0 }]
  for (const { id, places, region, coming, usedMs } of cache?.nodes() ?? []) {
    if (!places) continue
    const state = coming ? 'moving' : region < 0 ? 'cold' : 'copy'
    yield [places, { state, prefix: id, ageMs: coming ? 0 : nowMs - usedMs }]
  }
}

function runOf(place: number, tier: Level, owners: readonly Owner[]): KvPlaceRun {
  return {
    tier,
    first: place,
    end: place + 1,
    state: STATES.find((state) => owners.some((owner) => owner.state === state)) ?? 'moving',
    sequences: owners.flatMap(({ sequence }) => sequence ?? []),
    prefixes: owners.flatMap(({ prefix }) => prefix ?? []),
    references: owners.length,
    ageMs: Math.min(...owners.map(({ ageMs }) => ageMs)),
  }
}

function sameOwners(a: readonly Owner[], b: readonly Owner[]): boolean {
  return a.length === b.length && a.every((owner, i) => owner === b[i])
}
