// Catches a store that forgets what was durable, believes what was torn or changed, or gives one
// engine the prefixes of another. Files, pager and crashes of the log are real.

import assert from 'node:assert/strict'
import {
  copyFileSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { Random } from '../../../test/support/random.ts'
import { temporaryDirectory } from '../../../test/support/temporary.ts'
import { places, TierBench, type TierBenchOptions } from '../../../test/support/tier-bench.ts'
import { closeFd, mapAnonymous, viewMemory } from '../../ffi/libc.ts'
import type { StoredPrefix } from '../../kv/tier.ts'
import { Keys } from '../keys.ts'
import { ColumnSeals } from '../seals.ts'
import { type TierGeometry, TierShared } from '../shared.ts'
import { openStore } from './open.ts'
import { DiskStore } from './store.ts'

const NAMESPACE = 'model'
const secret = (first = 7) => Uint8Array.from({ length: 32 }, (_, i) => first + i)

interface StoreBench extends TierBenchOptions {
  directory: string
  namespace?: string
  key?: number
}

function open({ directory, namespace = NAMESPACE, key = 7, ...rest }: StoreBench): TierBench {
  return new TierBench({ ...rest, store: { directory, namespace, secret: secret(key) } })
}

/** Saves `count` columns from slot 0's column `first` on to the places of the same numbers. */
function save(b: TierBench, first: number, count: number): void {
  for (let c = first; c < first + count; c++) b.write(0, c, c)
  const columns = { region: 0, first, end: first + count }
  assert.equal(b.ended(b.tier.save(columns, places(first, count))), undefined)
}

/** A prefix of 8 tokens a column, in the places of its columns. */
function prefix(parent: number, first: number, count: number, tenant = 'a') {
  return {
    parent,
    tenant,
    from: first * 8,
    tokens: Int32Array.from({ length: count * 8 }, (_, i) => first * 1000 + i),
    firstColumn: first,
    places: places(first, count),
  }
}

function keep(b: TierBench, what: Omit<StoredPrefix, 'id'>): number {
  const { id, ticket } = b.tier.store!.put(what)
  assert.equal(b.ended(ticket), undefined)
  return id
}

test('what was durable is gone after a restart, or has other content', async (t) => {
  const directory = temporaryDirectory('store')
  const first = open({ directory })
  save(first, 0, 7)
  const root = keep(first, prefix(0, 0, 3))
  const child = keep(first, prefix(root, 3, 4))
  await first.close()
  const again = open({ directory })
  t.after(() => again.close())
  assert.deepEqual(again.tier.store!.entries(), [
    { id: root, ...prefix(0, 0, 3) },
    { id: child, ...prefix(root, 3, 4) },
  ])
  assert.deepEqual(again.tier.facts.store, {
    directory: join(directory, NAMESPACE),
    prefixes: 2,
    tokens: 56,
    lost: 0,
    beyond: 0,
  })
  again.kv.map(1, 4, [])
  const ticket = again.tier.load({ region: 4, first: 0, end: 7 }, places(0, 7))
  for (let c = 0; c < 7; c++) assert.ok(again.holds(1, c, c))
  assert.equal(again.ended(ticket), undefined)
  // Columns of both starts in one prefix.
  for (let c = 7; c < 9; c++) again.write(0, c, c)
  again.ended(again.tier.save({ region: 0, first: 7, end: 9 }, places(7, 2)))
  keep(again, { ...prefix(root, 3, 6) })
})

test('what a smaller file has no room for passes for torn, or comes back', async () => {
  const directory = temporaryDirectory('store')
  const first = open({ directory })
  save(first, 0, 9)
  const root = keep(first, prefix(0, 0, 3))
  const child = keep(first, prefix(root, 3, 4))
  keep(first, prefix(child, 7, 2))
  await first.close()
  for (const [capacity, beyond] of [
    [5, 2],
    [64, 0],
  ] as const) {
    const again = open({ directory, capacity })
    const { store } = again.tier.facts
    await again.close()
    assert.deepEqual([store!.prefixes, store!.lost, store!.beyond], [1, 0, beyond])
  }
})

test('a log that was half written in a crash stays for ever', async () => {
  const directory = temporaryDirectory('store')
  await open({ directory }).close()
  writeFileSync(join(directory, NAMESPACE, 'log.new'), 'lattice kv')
  await open({ directory }).close()
  assert.deepEqual(readdirSync(join(directory, NAMESPACE)).toSorted(), ['columns', 'lock', 'log'])
})

test('what was removed comes back, with or without what continued it', async () => {
  const directory = temporaryDirectory('store')
  const b = open({ directory })
  save(b, 0, 9)
  const root = keep(b, prefix(0, 0, 3))
  const child = keep(b, prefix(root, 3, 2))
  keep(b, prefix(child, 5, 1))
  const other = keep(b, prefix(0, 0, 2, 'b'))
  b.tier.store!.remove(child)
  await b.close()
  const again = open({ directory })
  const ids = again.tier.store!.entries().map(({ id }) => id)
  await again.close()
  assert.deepEqual(ids, [root, other])
})

test('one engine reads the store of another model, another key or another engine', async (t) => {
  const directory = temporaryDirectory('store')
  const b = open({ directory })
  t.after(() => b.close())
  save(b, 0, 1)
  keep(b, prefix(0, 0, 1))
  const refused = (options: Partial<StoreBench>, message: RegExp) =>
    assert.throws(() => open({ directory, ...options }), { code: 'kv_store_invalid', message })
  refused({}, /in use by another engine/)
  const other = open({ directory, namespace: 'other' })
  assert.deepEqual(other.tier.store!.entries(), [])
  await other.close()
  refused({ namespace: 'other', key: 8 }, /another key/)
  writeFileSync(join(directory, 'other', 'log'), 'my diary')
  refused({ namespace: 'other' }, /no KV store/)
  assert.equal(readFileSync(join(directory, 'other', 'log'), 'utf8'), 'my diary')
})

test('a directory that can hold no store is a defect of ours, or looked for without an end', () => {
  const file = join(temporaryDirectory('store'), 'file')
  writeFileSync(file, '')
  // In /proc nobody can make anything, and making parents there never ends.
  for (const directory of [file, join(file, 'x'), join(file, '..', 'a', 'b'), '/proc/x']) {
    assert.throws(() => open({ directory }), {
      code: 'os_call_failed',
      message: /cannot hold a KV store: E/,
      todo: /--kv-store/,
    })
  }
})

test('a log of prefixes that are gone grows for ever, or is rewritten wrongly', async () => {
  const directory = temporaryDirectory('store')
  const log = join(directory, NAMESPACE, 'log')
  const b = open({ directory, columns: 4096, capacity: 64, regions: 3 })
  save(b, 0, 4)
  const root = keep(b, prefix(0, 0, 2))
  // 400 records of 12 KB would be 5 MB.
  for (let i = 0; i < 400; i++) {
    const tokens = Int32Array.from({ length: 3000 }, (_, t) => t * i)
    const id = keep(b, { ...prefix(root, 2, 2), tokens })
    if (i < 399) b.tier.store!.remove(id)
  }
  await b.close()
  assert.ok(statSync(log).size < 2 << 20, `${statSync(log).size} bytes`)
  const again = open({ directory, columns: 4096, capacity: 64, regions: 3 })
  const entries = again.tier.store!.entries()
  assert.deepEqual(
    entries.map(({ tokens }) => tokens.length),
    [16, 3000],
  )
  assert.equal(entries[1]!.tokens[2], 2 * 399)
  assert.equal(again.tier.facts.store!.lost, 0)
  await again.close()
})

/** Geometry of one range: a column is one page. */
const GEOMETRY: TierGeometry = {
  slots: 1,
  regions: 1,
  columns: 64,
  ranges: 1,
  pageBytes: 4096,
  rangeBytes: 64 * 4096,
  slotBytes: 64 * 4096,
  capacity: 48,
}

interface Grown {
  path: string
  prefixes: StoredPrefix[]
  removed: StoredPrefix
  data: Buffer[]
}

/** A store of prefixes in a tree, one removed, one place used again; and what each place holds. */
async function grownStore(): Promise<Grown> {
  const directory = temporaryDirectory('store')
  const b = open({ directory, layers: 1, capacity: 48, columns: 64 })
  const ids: number[] = []
  const columns = (first: number, count: number) => save(b, first, count)
  columns(0, 48)
  for (let i = 0; i < 12; i++) {
    const parent = i % 4 === 0 ? 0 : ids.at(-1)!
    const at = i % 4 === 0 ? 0 : (i % 4) * 4
    ids.push(keep(b, { ...prefix(parent, at, 4), places: places(i * 4, 4) }))
  }
  const removed = { id: ids[11]!, ...prefix(ids[10]!, 12, 4), places: places(44, 4) }
  b.tier.store!.remove(removed.id)
  columns(44, 4)
  ids[11] = keep(b, { ...prefix(ids[10]!, 12, 4), places: places(44, 4) })
  const data = Array.from({ length: 48 }, (_, c) => {
    return Buffer.from(Int32Array.from({ length: 1024 }, (_, i) => b.word(0, c, 0, i)).buffer)
  })
  await b.close()
  const again = open({ directory, layers: 1, capacity: 48, columns: 64 })
  const prefixes = [...again.tier.store!.entries()]
  await again.close()
  assert.equal(prefixes.length, 12)
  return { path: join(directory, NAMESPACE), prefixes, removed, data }
}

interface Reading {
  prefixes: readonly StoredPrefix[]
  lost: number
  /** Places whose content was refused. */
  refused: number[]
}

/** Opens a store without a pager and decrypts all that it says it has. */
function readAll(directory: string, data: readonly Buffer[]): Reading {
  const keys = new Keys()
  const options = { directory, namespace: NAMESPACE, secret: secret() }
  const opened = openStore(options, keys, GEOMETRY.capacity, 4096)
  const shared = new TierShared(GEOMETRY, -1)
  const store = new DiskStore(opened, shared, () => 0)
  const { addresses } = keys
  const seals = new ColumnSeals(shared, { addresses, current: 0, fileId: opened.keys.storeId })
  const file = readFileSync(join(opened.directory, 'columns'))
  const memory = Buffer.from(viewMemory(scratch, 4096))
  const refused: number[] = []
  for (const place of new Set(opened.prefixes.flatMap(({ places }) => [...places]))) {
    file.copy(memory, 0, place * 4096, (place + 1) * 4096)
    if (!seals.open(scratch, place)) refused.push(place)
    else assert.ok(memory.equals(data[place]!), `place ${place} has wrong content`)
  }
  seals.close()
  store.close()
  closeFd(opened.columns.fd)
  keys.close()
  return { prefixes: opened.prefixes, lost: opened.lost, refused }
}

const scratch = mapAnonymous(4096)

function copyOf(path: string): { directory: string; log: string; columns: string } {
  const directory = temporaryDirectory('store')
  const to = join(directory, NAMESPACE)
  mkdirSync(to)
  for (const name of ['log', 'columns']) copyFileSync(join(path, name), join(to, name))
  return { directory, log: join(to, 'log'), columns: join(to, 'columns') }
}

test('one damaged record or column takes others with it, or is believed', async () => {
  const { path, prefixes, data } = await grownStore()
  const whole = readAll(copyOf(path).directory, data)
  assert.deepEqual(whole, { prefixes, lost: 0, refused: [] })
  const changed = copyOf(path)
  const log = readFileSync(changed.log)
  const tree = prefixes.map(({ id, parent }) => ({ id, parent }))
  // The second prefix of the first chain: its frame follows the first's, behind the head.
  const firstFrame = 48 + Math.ceil((48 + log.readUInt32LE(48 + 4)) / 16) * 16
  log[firstFrame + 60]! ^= 4
  writeFileSync(changed.log, log)
  const columns = readFileSync(changed.columns)
  columns[20 * 4096 + 5]! ^= 1
  writeFileSync(changed.columns, columns)
  const read = readAll(changed.directory, data)
  const fallen = new Set(tree.slice(1, 4).map(({ id }) => id))
  assert.deepEqual(
    read.prefixes.map(({ id }) => id),
    tree.map(({ id }) => id).filter((id) => !fallen.has(id)),
  )
  // The record itself, and two that continued it.
  assert.deepEqual([read.lost, read.refused], [3, [20]])
})

test('1,000 stores torn and changed at random give a wrong byte', async (t) => {
  const seed = 1 + Math.floor(Math.random() * 1e9)
  t.diagnostic(`seed ${seed}`)
  const random = new Random(seed)
  const { path, prefixes, removed, data } = await grownStore()
  // If the record of its removal was hit, what was removed is back: true, but without its columns.
  const byId = new Map([...prefixes, removed].map((prefix) => [prefix.id, prefix]))
  const original = {
    log: readFileSync(join(path, 'log')),
    columns: readFileSync(join(path, 'columns')),
  }
  const directory = temporaryDirectory('store')
  const to = join(directory, NAMESPACE)
  mkdirSync(to)
  const seen = { whole: 0, lost: 0, refused: 0, invalid: 0 }
  for (let run = 0; run < 1000; run++) {
    const files = { log: Buffer.from(original.log), columns: Buffer.from(original.columns) }
    for (let hits = 1 + random.below(3); hits > 0; hits--) {
      const name = random.below(4) === 0 ? 'columns' : 'log'
      files[name] = damaged(files[name], random)
    }
    writeFileSync(join(to, 'log'), files.log)
    writeFileSync(join(to, 'columns'), files.columns)
    try {
      const read = readAll(directory, data)
      for (const found of read.prefixes) assert.deepEqual(found, byId.get(found.id))
      seen.lost += read.lost
      seen.refused += read.refused.length
      if (read.prefixes.length === prefixes.length && read.refused.length === 0) seen.whole++
    } catch (thrown) {
      // Only a head that was hit makes all of it unreadable, and that is said.
      assert.equal(
        (thrown as { code?: string }).code,
        'kv_store_invalid',
        `seed ${seed}: ${thrown}`,
      )
      const head = (log: Buffer) => log.subarray(0, 48)
      assert.ok(!head(files.log).equals(head(original.log)))
      seen.invalid++
    }
  }
  t.diagnostic(JSON.stringify(seen))
  assert.ok(seen.lost > 100 && seen.refused > 10 && seen.invalid > 0, 'the damage was felt')
})

function damaged(file: Buffer<ArrayBuffer>, random: Random): Buffer<ArrayBuffer> {
  const at = random.below(file.length)
  const kind = random.below(5)
  if (kind === 0) return Buffer.from(file.subarray(0, at))
  if (kind === 1) file[at]! ^= 1 << random.below(8)
  const bytes = Math.min(random.below(600), file.length - at)
  if (kind === 2) file.fill(random.below(256), at, at + bytes)
  // A piece of it elsewhere: true frames and columns, at wrong places.
  const unit = random.below(2) === 0 ? 16 : 4096
  const from = Math.floor(random.below(file.length) / unit) * unit
  const into = Math.floor(at / unit) * unit
  if (kind === 3) file.copy(file, into, from, from + unit * (1 + random.below(8)))
  if (kind === 4) return Buffer.concat([file, file.subarray(into)])
  return file
}
