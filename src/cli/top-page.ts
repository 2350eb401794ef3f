// Owns how `lattice top` looks: one page of lines for a width and height, from what a server said.

import { styleText } from 'node:util'
import type { EngineSnapshot, SequenceSnapshot } from '../engine/api.ts'
import type { KvMap, PageState } from '../kv/map.ts'
import type { KvOutside, PlaceState } from '../kv/outside.ts'
import { formatBytes, formatMs } from './table.ts'
import { printable } from './terminal.ts'
import type { KvReport, Rates } from './top-samples.ts'

export interface TopOptions {
  url: string
  width: number
  height: number
  /** Without it the glyphs alone tell states apart. */
  colour: boolean
  rates: Rates | undefined
}

type Colour = Parameters<typeof styleText>[0]

interface Look<State> {
  state: State
  glyph: string
  hot: Colour
  cold: Colour
}

/** A glyph of its own for each state, so that the map is read without colours too. */
const LOOKS: readonly Look<PageState>[] = [
  { state: 'live', glyph: '█', hot: 'greenBright', cold: 'green' },
  { state: 'shared', glyph: '▓', hot: 'cyanBright', cold: 'cyan' },
  { state: 'pinned', glyph: '◆', hot: 'magentaBright', cold: 'magenta' },
  { state: 'cached', glyph: '▒', hot: 'blueBright', cold: 'blue' },
  { state: 'warm', glyph: '░', hot: 'yellowBright', cold: 'yellow' },
  { state: 'moving', glyph: '▞', hot: 'redBright', cold: 'red' },
]
const DISK_LOOKS: readonly Look<PlaceState>[] = [
  { state: 'cold', glyph: '■', hot: 'blueBright', cold: 'blue' },
  { state: 'offloaded', glyph: '▣', hot: 'greenBright', cold: 'green' },
  { state: 'copy', glyph: '□', hot: 'white', cold: 'gray' },
  { state: 'moving', glyph: '▞', hot: 'redBright', cold: 'red' },
]
const FREE = '·'

/** A page that was not used for this long is shown dark. */
const COLD_MS = 60_000

/** Text and its style; a line is as wide as its texts together. */
type Part = readonly [text: string, style?: Colour | undefined]
type Line = readonly Part[]

/** The page's lines, none wider than `width`, `height` of them at most. */
export function topPage(report: KvReport, options: TopOptions): string[] {
  const { width, height } = options
  const { engine, kv } = report
  const head = [
    titleLine(report, options),
    ...memoryLines(kv, width),
    ...diskLines(report, width),
    rateLine(report, options),
  ]
  const left = Math.max(0, height - head.length)
  // The map is what the page is for: sequences and history get a share, it gets the rest.
  const history = historyLines(kv, Math.min(8, Math.floor(left / 4)))
  const rows = Math.min(engine.sequences.length + 1, Math.max(3, Math.floor(left / 3)))
  const sequences = sequenceLines(engine.sequences, rows, width)
  const map = mapLines(kv, width, left - history.length - sequences.length)
  return [...head, ...sequences, ...map, ...history]
    .slice(0, height)
    .map((line) => render(line, options))
}

function titleLine({ model }: KvReport, { url, width }: TopOptions): Line {
  const left = ` lattice top · ${printable(model)}`
  const right = `${url.replace(/^https?:\/\//, '')} · q quits `
  return [[spread(left, right, width), ['inverse', 'bold']]]
}

/** What is in use of the limit, by state as a bar, and how much of it is tokens. */
function memoryLines(kv: KvMap, width: number): Line[] {
  const bar = barLine(' KV ', LOOKS, kv.pages, kv.limitPages, width)
  const used = `${bytes(kv, kv.usedPages)} of ${bytes(kv, kv.limitPages)}`
  const tokens = `${formatBytes(kv.tokenBytes)} of it tokens`
  const fragmentation = `fragmentation ${percentText(kv.fragmentation, 1)}`
  const share = percentText(kv.usedPages / Math.max(1, kv.limitPages))
  return [bar, [[`    ${used}, ${share}`, 'bold'], [` · ${tokens} · ${fragmentation}`]]]
}

/** The same of what is outside of memory, and what went there and came back since the start. */
function diskLines({ engine: { tier }, kv }: KvReport, width: number): Line[] {
  const { disk } = kv
  if (!disk || !tier) return []
  const { levels } = tier
  const title = levels ? ' HOST ' : ' DISK '
  const bar = barLine(title, DISK_LOOKS, disk.pages, disk.capacityPages, width)
  const used = `${bytes(kv, disk.usedPages)} of ${bytes(kv, disk.capacityPages)}`
  const share = percentText(disk.usedPages / disk.capacityPages)
  const moved = `${shortBytes(tier.savedBytes)} out, ${shortBytes(tier.loadedBytes)} in`
  const { faults, lost } = tier
  const rest = ` · ${moved} · ${faults} fault${faults === 1 ? '' : 's'}`
  const onDisk = levels && levels.diskBytes > 0
  const below = onDisk ? `, ${shortBytes(levels.diskUsedBytes)} on disk` : ''
  const where = tier.path === undefined ? '' : ` · encrypted in ${printable(tier.path)}`
  return [
    bar,
    [
      [`    ${used}, ${share}${below}`, 'bold'],
      [rest],
      [` · ${lost} lost`, lost > 0 ? 'yellowBright' : undefined],
      [where],
    ],
  ]
}

function barLine<State extends string>(
  title: string,
  looks: readonly Look<State>[],
  states: Record<State, number>,
  limitPages: number,
  width: number,
): Line {
  const cells = Math.max(10, width - title.length - 1)
  const bar: Part[] = [[title]]
  let [shown, pages] = [0, 0]
  for (const { state, glyph, hot } of looks) {
    pages += states[state]
    // What is there at all gets a cell; rounding the sum keeps the whole bar's length true.
    const end = Math.min(cells, Math.round((pages / Math.max(1, limitPages)) * cells))
    const count = Math.max(states[state] > 0 ? 1 : 0, end - shown)
    bar.push([glyph.repeat(count), hot])
    shown += count
  }
  bar.push([FREE.repeat(Math.max(0, cells - shown)), 'gray'])
  return bar
}

function rateLine({ engine }: KvReport, { rates }: TopOptions): Line {
  const speed = rates
    ? `${perSecond(rates.outputPerS)} out · ${perSecond(rates.promptPerS)} in` +
      ` · busy ${percentText(rates.busy)}`
    : 'measuring'
  return [[`    ${speed} · ${hitText(engine, rates)}`]]
}

/** Of the last seconds if there is something to say of them, and since the start. */
function hitText({ prefixQueries, prefixHits }: EngineSnapshot, rates: Rates | undefined): string {
  if (prefixQueries === 0) return 'no prefix was looked up'
  const all = percentText(prefixHits / prefixQueries)
  const now = rates?.hit
  return now === undefined ? `prefix hits ${all}` : `prefix hits ${percentText(now)} (all ${all})`
}

function sequenceLines(all: readonly SequenceSnapshot[], rows: number, width: number): Line[] {
  const waiting = all.filter(({ state }) => state === 'waiting').length
  const out = all.filter(({ state }) => state.startsWith('offload')).length
  const running = all.length - waiting - out
  const onDisk = out > 0 ? `, ${out} on disk` : ''
  const title = heading('SEQUENCES', `${running} running, ${waiting} waiting${onDisk}`)
  if (rows < 3) return [title]
  const shown = all.slice(0, all.length > rows - 1 ? rows - 2 : rows - 1)
  const name = Math.max(8, Math.min(32, width - 68))
  const lines = shown.map((sequence): Line => {
    const { state, promptTokens, outputTokens, pages, bytes: size, ageMs } = sequence
    const colour: Colour =
      state === 'decode' ? 'greenBright' : state === 'prefill' ? 'cyanBright' : 'gray'
    const numbers = [`${promptTokens} in`, `${outputTokens} out`, `${pages} pages`]
      .map((text) => text.padStart(11))
      .join('')
    return [
      [`  ${cut(printable(sequence.requestId), name).padEnd(name)} `],
      [state.padEnd(10), colour],
      [`${numbers}${formatBytes(size).padStart(10)}${formatMs(ageMs).padStart(10)}`],
    ]
  })
  const more = all.length - shown.length
  return [title, ...lines, ...(more > 0 ? [[[`  … ${more} more`, 'gray'] as const]] : [])]
}

/**
 * Used pages as blocks, region after region, then those on disk, place after place; a block stands
 * for as many columns as it must.
 */
function mapLines(kv: KvMap, width: number, rows: number): Line[] {
  if (rows < 2) return []
  const { disk } = kv
  // The disk's legend, and a third of the rows as long as there is something to show.
  const below = !disk || rows < 6 ? 0 : disk.runs.length > 0 ? Math.floor(rows / 3) : 1
  const heads = rows < 4 ? 1 : 2
  const perLine = Math.max(10, width - 4)
  const each = Math.max(
    columnsPerBlock(kv.runs, perLine * (rows - below - heads)),
    below > 1 ? columnsPerBlock(disk?.runs ?? [], perLine * (below - 1)) : 1,
  )
  const block = formatBytes(each * kv.columnPages * kv.pageBytes)
  const scale: Line = [[`  A block is ${block}; a dark one was not used for a minute.`, 'gray']]
  const lines: Line[] = [legend(' MAP', LOOKS, kv.pages, kv.pageBytes)]
  if (heads === 2) lines.push(scale)
  lines.push(...blockLines(blocksOf(kv.runs, LOOKS, each), perLine))
  if (kv.runs.length === 0) lines.push([['  Nothing is in memory.', 'gray']])
  if (!disk || below === 0) return lines
  const title = disk.runs.some(({ tier }) => tier === 'host') ? ' HOST' : ' DISK'
  lines.push(legend(title, DISK_LOOKS, disk.pages, kv.pageBytes))
  if (below > 1) lines.push(...blockLines(blocksOf(disk.runs, DISK_LOOKS, each), perLine))
  return lines
}

function legend<State extends string>(
  title: string,
  looks: readonly Look<State>[],
  states: Record<State, number>,
  pageBytes: number,
): Line {
  const parts = looks.flatMap(({ state, glyph, hot }): Part[] => {
    const size = states[state] > 0 ? ` ${shortBytes(states[state] * pageBytes)}` : ''
    return [['  '], [glyph, hot], [` ${state}${size}`, size === '' ? 'gray' : undefined]]
  })
  return [[title, 'bold'], ...parts]
}

function blockLines(blocks: readonly Part[], perLine: number): Line[] {
  const lines: Line[] = []
  for (let i = 0; i < blocks.length; i += perLine) {
    lines.push([['  '], ...joined(blocks.slice(i, i + perLine))])
  }
  return lines
}

function columnsPerBlock(runs: KvOutside['runs'] | KvMap['runs'], blocks: number): number {
  const columns = runs.reduce((sum: number, { first, end }) => sum + end - first, 0)
  return Math.max(1, Math.ceil(columns / blocks))
}

/** Each block has the look of most of its columns; dark if those are cold. */
function blocksOf<State extends string>(
  runs: readonly { first: number; end: number; state: State; ageMs: number }[],
  looks: readonly Look<State>[],
  each: number,
): Part[] {
  const blocks: Part[] = []
  let counts = new Map<string, { part: Part; count: number }>()
  let filled = 0
  const flush = (): void => {
    const most = [...counts.values()].reduce((a, b) => (b.count > a.count ? b : a))
    blocks.push(most.part)
    counts = new Map()
    filled = 0
  }
  for (const run of runs) {
    const cold = run.ageMs > COLD_MS
    const look = looks.find(({ state }) => state === run.state)
    if (!look) continue
    const key = `${run.state} ${cold}`
    for (let at = run.first; at < run.end;) {
      const count = Math.min(run.end - at, each - filled)
      const entry = counts.get(key) ?? {
        part: [look.glyph, cold ? look.cold : look.hot] as const,
        count: 0,
      }
      entry.count += count
      counts.set(key, entry)
      filled += count
      at += count
      if (filled === each) flush()
    }
  }
  if (filled > 0) flush()
  return blocks
}

/** Neighbours of one style become one part: fewer escape sequences. */
function joined(blocks: readonly Part[]): Part[] {
  const parts: Part[] = []
  for (const [text, style] of blocks) {
    const last = parts.at(-1)
    if (last && last[1] === style) parts[parts.length - 1] = [last[0] + text, style]
    else parts.push([text, style])
  }
  return parts
}

function historyLines(kv: KvMap, rows: number): Line[] {
  if (rows < 2) return []
  const totals = Object.entries(kv.totals).map(
    ([kind, { count, bytes: size }]) => `${kind} ${count} (${shortBytes(size)})`,
  )
  const title = heading('HISTORY', totals.length > 0 ? `all: ${totals.join('  ')}` : '')
  const events = kv.history.slice(-(rows - 1)).toReversed()
  if (events.length === 0) return [title, [['  Nothing was shared, evicted or preempted.', 'gray']]]
  return [
    title,
    ...events.map(({ kind, count, bytes: size, ageMs }): Line => {
      const alarm = kind === 'preempt' || kind === 'lost' ? 'yellowBright' : undefined
      return [
        [`  ${formatMs(ageMs).padStart(12)} ago  `, 'gray'],
        [kind.padEnd(8), alarm],
        [`${`${count} ×`.padStart(7)}  ${formatBytes(size)}`],
      ]
    }),
  ]
}

function heading(title: string, rest: string): Line {
  return [
    [` ${title}`, 'bold'],
    [rest === '' ? '' : `  ${rest}`, 'gray'],
  ]
}

/** The line as the terminal gets it, cut to the width. */
function render(line: Line, { width, colour }: TopOptions): string {
  let [text, room] = ['', width]
  for (const [part, style] of line) {
    const kept = cut(part, room)
    room -= [...kept].length
    text +=
      colour && style && kept !== '' ? styleText(style, kept, { validateStream: false }) : kept
  }
  return text
}

function spread(left: string, right: string, width: number): string {
  const room = width - [...right].length
  return room > [...left].length ? left.padEnd(room) + right : cut(left, width).padEnd(width)
}

function cut(text: string, width: number): string {
  const characters = [...text]
  if (characters.length <= width) return text
  return width < 1 ? '' : `${characters.slice(0, width - 1).join('')}…`
}

function bytes(kv: KvMap, pages: number): string {
  return formatBytes(pages * kv.pageBytes)
}

function percentText(share: number, digits = 0): string {
  return `${(100 * share).toFixed(digits)} %`
}

/** As the command line takes sizes: 9.8M, 512M. */
function shortBytes(size: number): string {
  const [number = '', unit = ''] = formatBytes(size).split(' ')
  return `${Number(Number(number).toFixed(Number(number) < 10 ? 1 : 0))}${unit.slice(0, 1)}`
}

function perSecond(rate: number): string {
  return `${Number(rate.toFixed(rate < 10 ? 1 : 0)).toLocaleString('en')} tok/s`
}
