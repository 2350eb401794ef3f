// Owns the process that is killed: it checks what a store kept, then saves, keeps and forgets
// prefixes without pause, telling on stdout what is durable.
//
//   node kv-store-child.ts DIRECTORY SEED LEDGER     (LEDGER: JSON of ids that must be there)

import assert from 'node:assert/strict'
import { readFileSync, writeSync } from 'node:fs'
import type { StoredPrefix } from '../../src/kv/tier.ts'
import { Random } from '../support/random.ts'
import { TierBench } from '../support/tier-bench.ts'

const [directory = '', seed = '1', ledger = ''] = process.argv.slice(2)
const CAPACITY = 96
const COLUMNS = 8

const random = new Random(Number(seed))
const secret = new Uint8Array(32).fill(5)
const b = new TierBench({
  columns: COLUMNS,
  capacity: CAPACITY,
  store: { directory, namespace: 'soak', secret },
})
const store = b.tier.store!
const say = (line: string) => writeSync(1, `${line}\n`)
const free = new Set(Array.from({ length: CAPACITY }, (_, i) => i))
const kept = new Map<number, StoredPrefix>()

verify(new Set(JSON.parse(readFileSync(ledger, 'utf8')) as number[]))
say(`ready ${kept.size} ${b.tier.facts.store!.lost}`)
for (;;) {
  if (random.below(3) === 0 || free.size < COLUMNS) forget()
  else keep()
}

/** Every prefix has the content that its tokens say, and those that must be there are. */
function verify(durable: Set<number>): void {
  for (const prefix of store.entries()) {
    const columns = { region: 4, first: 0, end: prefix.places.length }
    b.kv.map(1, 4, [])
    const error = b.ended(b.tier.load(columns, prefix.places))
    if (error) assert.ok(!durable.has(prefix.id), `prefix ${prefix.id} was durable: ${error}`)
    else prefix.places.forEach((_, c) => assert.ok(b.holds(1, c, content(prefix, c))))
    b.kv.discard(4, 0, COLUMNS)
    if (error) store.remove(prefix.id)
    else kept.set(prefix.id, prefix)
  }
  for (const id of durable) assert.ok(kept.has(id), `prefix ${id} was durable and is gone`)
  for (const { places } of kept.values()) for (const place of places) free.delete(place)
}

function keep(): void {
  const places = Uint32Array.from([...free].slice(0, 1 + random.below(COLUMNS)))
  for (const place of places) free.delete(place)
  const tokens = Int32Array.from({ length: 40 }, () => random.below(1e6))
  const prefix = { parent: 0, tenant: 't', from: 0, tokens, firstColumn: 0, places }
  places.forEach((_, c) => b.write(0, c, content(prefix, c)))
  b.ended(b.tier.save({ region: 0, first: 0, end: places.length }, places))
  const { id, ticket } = store.put(prefix)
  assert.equal(b.ended(ticket), undefined)
  kept.set(id, { id, ...prefix })
  say(`durable ${id}`)
}

function forget(): void {
  const ids = [...kept.keys()]
  const id = ids[random.below(ids.length)]
  if (id === undefined) return
  say(`forgotten ${id}`)
  for (const place of kept.get(id)!.places) free.add(place)
  kept.delete(id)
  store.remove(id)
}

function content({ tokens }: Pick<StoredPrefix, 'tokens'>, column: number): number {
  return (tokens[0] ?? 0) + column
}
