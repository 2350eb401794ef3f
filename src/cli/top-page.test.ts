// Catches a page of `lattice top` that does not fit its terminal, hides what is there, shows what
// is not, or lets a request's name command the terminal.

import assert from 'node:assert/strict'
import { stripVTControlCharacters } from 'node:util'
import { test } from 'node:test'
import type { KvRun, PageState } from '../kv/map.ts'
import type { KvPlaceRun, PlaceState } from '../kv/outside.ts'
import type { TierLevels } from '../kv/tier.ts'
import { topPage } from './top-page.ts'
import { type KvReport, Samples } from './top-samples.ts'

function run(region: number, first: number, end: number, state: PageState, ageMs = 0): KvRun {
  const ids = { sequences: [], prefixes: [] }
  return { region, first, end, state, tier: 'memory', ...ids, references: 1, ageMs }
}

/** Four pages a column; 500 columns of a limit of 1,000 in use. */
const RUNS = [
  run(0, 0, 200, 'live'),
  run(0, 200, 210, 'shared'),
  run(3, 5, 205, 'cached'),
  run(3, 205, 285, 'cached', 100_000),
  run(4, 0, 10, 'warm'),
]
const PAGES = { live: 800, shared: 40, pinned: 0, cached: 1120, warm: 40, moving: 0 }

interface Change {
  runs?: KvRun[]
  sequences?: number
  name?: string
  disk?: boolean
  levels?: TierLevels
  path?: string
  lost?: number
}

const place = (first: number, end: number, state: PlaceState, ageMs = 0): KvPlaceRun => ({
  tier: 'disk',
  first,
  end,
  state,
  ...{ sequences: [], prefixes: [], references: 1, ageMs },
})

/** 100 columns of a capacity of 400 in use. */
const DISK = {
  capacityPages: 1600,
  usedPages: 400,
  pages: { cold: 200, offloaded: 80, copy: 40, moving: 80 },
  runs: [
    place(0, 50, 'cold', 100_000),
    place(50, 70, 'offloaded'),
    place(100, 110, 'copy'),
    place(110, 130, 'moving'),
  ],
}

function report(change: Change = {}): KvReport {
  const { runs = RUNS, sequences = 3, name = 'r', disk = false, path, levels, lost = 0 } = change
  const none = { live: 0, shared: 0, pinned: 0, cached: 0, warm: 0, moving: 0 }
  const pages = runs.length > 0 ? PAGES : none
  const usedPages = Object.values(pages).reduce((a, b) => a + b, 0)
  return {
    model: 'some/model',
    engine: {
      sequences: Array.from({ length: sequences }, (_, id) => ({
        id,
        requestId: `${name}${id}`,
        tenant: 'default',
        state: (['decode', 'prefill', 'waiting'] as const)[id % 3]!,
        promptTokens: 100,
        kvTokens: 100,
        outputTokens: 10,
        pages: 40,
        bytes: 1 << 20,
        ageMs: 1500,
      })),
      running: 2,
      waiting: 1,
      kv: {
        pageBytes: 4096,
        usedPages,
        limitPages: 4000,
        residentBytes: 0,
        cachedPages: 0,
        pinnedPages: 0,
        prefixLimitPages: 0,
      },
      prefixQueries: 1000,
      prefixHits: 250,
      prefixEvictions: 0,
      steps: 10,
      promptTokens: 500,
      outputTokens: 100,
      finished: { stop: 0, length: 0, abort: 0, error: 0 },
      beamCopies: 0,
      preemptions: 0,
      ...(disk && {
        tier: {
          ...(path !== undefined && { path }),
          ...(levels && { levels }),
          capacityBytes: 1600 * 4096,
          usedBytes: 400 * 4096,
          savedBytes: 12 << 20,
          loadedBytes: 3 << 20,
          offloads: 1,
          demotions: 2,
          fetches: 1,
          lost,
          faults: 1,
          kept: 0,
        },
      }),
      computeMs: 1000,
      stepMs: 1000,
    },
    kv: {
      pageBytes: 4096,
      columnPages: 4,
      columnTokens: 5.3,
      limitPages: 4000,
      usedPages,
      pages,
      tokenBytes: 7 << 20,
      fragmentation: 0.0312,
      runs,
      ...(disk && { disk: DISK }),
      prefixes: [],
      history: [
        { kind: 'fork', ageMs: 65_000, count: 4, bytes: 1 << 20 },
        { kind: 'preempt', ageMs: 2000, count: 1, bytes: 163_840 },
      ],
      totals: { fork: { count: 4, bytes: 1 << 20 }, preempt: { count: 1, bytes: 163_840 } },
    },
  }
}

const page = (given: KvReport, width = 80, height = 24, colour = false) =>
  topPage(given, { url: 'http://127.0.0.1:8080', width, height, colour, rates: undefined })

test('a page is wider or longer than its terminal', () => {
  for (const sequences of [0, 1, 3, 200]) {
    for (const [runs, disk] of [
      [RUNS, false],
      [[], false],
      [RUNS, true],
      [[], true],
    ] as const) {
      for (const [width, height] of [
        [80, 24],
        [40, 10],
        [20, 6],
        [100, 40],
        [250, 70],
        [1, 1],
      ] as const) {
        const lines = page(
          report({ sequences, runs: [...runs], disk, name: 'a-long-name-of-a-request-' }),
          width,
          height,
        )
        assert.ok(lines.length <= height, `${lines.length} lines of ${height}`)
        const widest = Math.max(...lines.map((line) => [...line].length))
        assert.ok(widest <= width, `${widest} columns of ${width}`)
      }
    }
  }
})

test('a GPU whose memory is all another process’s has a share that is no number', () => {
  const none = report({ runs: [], sequences: 0 })
  const text = page({ ...none, kv: { ...none.kv, limitPages: 0 } }).join('\n')
  assert.match(text, / 0 B of 0 B, 0 %/)
  assert.doesNotMatch(text, /NaN|Infinity/)
})

test('at 80 × 24 something is missing', () => {
  const lines = page(report())
  const text = lines.join('\n')
  for (const wanted of [
    'some/model',
    '127.0.0.1:8080 · q quits',
    '7.81 MiB of 15.6 MiB, 50 % · 7 MiB of it tokens · fragmentation 3.1 %',
    'prefix hits 25 %',
    'SEQUENCES  2 running, 1 waiting',
    'decode',
    'MAP  █ live 3.1M  ▓ shared 160K  ◆ pinned  ▒ cached 4.4M  ░ warm 160K',
    'A block is 16 KiB',
    'HISTORY  all: fork 4 (1M)  preempt 1 (160K)',
    '2.0 s ago  preempt     1 ×  160 KiB',
    '1 min 5 s ago  fork        4 ×  1 MiB',
  ]) {
    assert.ok(text.includes(wanted), `no "${wanted}" in\n${text}`)
  }
})

test('what is on disk is not shown, or as if it were in memory', () => {
  const lines = page(report({ disk: true, path: '/var/tmp' }), 100, 50)
  const text = lines.join('\n')
  for (const wanted of [
    '1.56 MiB of 6.25 MiB, 25 % · 12M out, 3M in · 1 fault · 0 lost · encrypted in /var/tmp',
    'DISK  ■ cold 800K  ▣ offloaded 320K  □ copy 160K  ▞ moving 320K',
  ]) {
    assert.ok(text.includes(wanted), `no "${wanted}" in\n${text}`)
  }
  const start = lines.findIndex((line) => line.startsWith(' DISK  ■ cold'))
  const blocks = lines
    .slice(
      start + 1,
      lines.findIndex((line) => line.includes('HISTORY')),
    )
    .join('')
  const count = (glyph: string) => blocks.split(glyph).length - 1
  assert.deepEqual(['■', '▣', '□', '▞', '█'].map(count), [50, 20, 10, 20, 0])
  const bar = lines[3]!
  assert.ok(Math.abs(bar.split('·').length - 1 - 0.75 * 93) < 1, 'three quarters are free')
  const small = page(report({ disk: true, path: '/var/tmp', lost: 3 })).join('\n')
  assert.ok(small.includes('■ cold 800K') && small.includes(' · 3 lost'), small)
  const evil = page(report({ disk: true, path: '/\x1b[2J' })).join('\n')
  assert.ok(!evil.includes('\x1b'), "a directory's name commands the terminal")
})

test("what lies in memory of a GPU's host is shown as on disk, or what is on disk is not", () => {
  const levels = { hostBytes: 4 << 20, hostUsedBytes: 1 << 20, diskBytes: 0, diskUsedBytes: 0 }
  const host = page(report({ disk: true, levels: { ...levels, spilledBytes: 0 } })).join('\n')
  assert.ok(/ HOST +[█■▣□▞·]/.test(host) && !host.includes('on disk'), host)
  const disk = { diskBytes: 8 << 20, diskUsedBytes: 512 << 10, spilledBytes: 1 << 20 }
  const both = page(report({ disk: true, levels: { ...levels, ...disk } })).join('\n')
  assert.ok(both.includes('25 %, 512K on disk · '), both)
})

test('the map has blocks of what is not there, or not as many', () => {
  const width = 60
  const lines = page(report(), width, 50)
  const start = lines.findIndex((line) => line.includes('A block is'))
  const blocks = lines
    .slice(
      start + 1,
      lines.findIndex((line) => line.includes('HISTORY')),
    )
    .join('')
  const count = (glyph: string) => blocks.split(glyph).length - 1
  // 500 columns fit: each is a block of its own.
  assert.deepEqual(['█', '▓', '▒', '░', '◆'].map(count), [200, 10, 280, 10, 0])
  assert.match(lines[start]!, /A block is 16 KiB/)
  const bar = lines[1]!
  const free = bar.split('·').length - 1
  assert.ok(Math.abs(free - (width - 5) / 2) < 1, 'half of it is free')
})

test('colours are what tells states apart, or cold ones look hot', () => {
  const [plain, coloured] = [page(report()), page(report(), 80, 24, true)]
  assert.ok(plain.every((line) => !line.includes('\x1b')))
  assert.deepEqual(coloured.map(stripVTControlCharacters), plain)
  const text = coloured.join('\n')
  assert.ok(text.includes('\x1b[94m▒') && text.includes('\x1b[34m▒'), 'hot and cold look alike')
})

test("a request's name commands the terminal", () => {
  const text = page(report({ name: '\x1b[2J\r\n' })).join('\n')
  assert.ok(text.includes('␛[2J') && !text.includes('\x1b') && !text.includes('\r'))
})

test('rates are not those of the last seconds', () => {
  const samples = new Samples()
  const at = (seconds: number, outputTokens: number, hits: number): void => {
    const given = report()
    const { engine } = given
    const change = { outputTokens, prefixQueries: 1000 + 100 * seconds, prefixHits: hits }
    samples.add({
      atMs: seconds * 1000,
      report: { ...given, engine: { ...engine, ...change, stepMs: 500 * seconds, steps: seconds } },
    })
  }
  at(0, 100, 250)
  assert.equal(samples.rates(), undefined)
  at(1, 150, 300)
  assert.deepEqual(samples.rates(), { outputPerS: 50, promptPerS: 0, hit: 0.5, busy: 0.5 })
  for (let second = 2; second <= 30; second++) at(second, 150, 300)
  assert.deepEqual(samples.rates(), { outputPerS: 0, promptPerS: 0, hit: 0, busy: 0.5 })
  // A server that began anew has done nothing yet; before it there is nothing to compare with.
  at(0, 0, 0)
  assert.equal(samples.rates(), undefined)
})
