// Owns the check that what is shown of KV memory is what is counted: every page once, with as many
// references as it has holders.

import assert from 'node:assert/strict'
import type { KvMap } from '../../src/kv/map.ts'

interface Counts {
  live: Uint16Array
  cache: Uint16Array
}

/** @param regions what is counted of each, by column; those never used may be missing */
export function checkMap(map: KvMap, regions: readonly (Counts | undefined)[]): void {
  const shown = regions.map((region) => new Uint16Array(region?.live.length ?? 0))
  for (const { region, first, end, references, ageMs } of map.runs) {
    assert.ok(references > 0 && ageMs >= 0 && Number.isFinite(ageMs), 'a run is what it can be')
    shown[region]!.fill(references, first, end)
  }
  regions.forEach((region, r) => {
    region?.live.forEach((live, column) => {
      const held = live + region.cache[column]!
      const message = `column ${column} of region ${r} has so many references on the map`
      assert.equal(shown[r]![column], held, message)
    })
  })
  const sum = (pages: Record<string, number>) => Object.values(pages).reduce((a, b) => a + b, 0)
  assert.equal(sum(map.pages), map.usedPages, 'the map has every page once')
  assert.ok(map.fragmentation >= 0 && map.fragmentation <= 1, 'tokens lie in pages that are used')
  const { disk } = map
  if (!disk) return
  assert.equal(sum(disk.pages), disk.usedPages, 'the map has every place once')
  const places = disk.runs.reduce((count, { first, end }) => count + end - first, 0)
  assert.equal(places * map.columnPages, disk.usedPages, 'runs have every place once')
}
