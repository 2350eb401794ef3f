// Owns how a transfer looks to who waits for it: a bar on a terminal, sparse lines elsewhere.

import { info } from '../../log.ts'

const REDRAW_MS = 100
const LINE_MS = 10_000
const BAR_CELLS = 24

/** Counts bytes and shows them on stderr. `total` may be learnt late or never. */
export class Progress {
  total: number | undefined
  private readonly label: string
  private readonly started = performance.now()
  private done = 0
  /** Bytes that were there before this transfer began: no part of its speed. */
  private before = 0
  private shownAt: number
  private readonly terminal: boolean

  constructor(label: string, total: number | undefined) {
    this.label = label
    this.total = total
    this.terminal = process.stderr.isTTY === true && process.env['LATTICE_LOG'] !== 'off'
    this.shownAt = this.terminal ? 0 : this.started
  }

  /** Bytes done by an earlier transfer that this one continues. */
  resumeAt(bytes: number): void {
    this.before = bytes
    this.done = bytes
  }

  add(bytes: number): void {
    this.set(this.done + bytes)
  }

  set(bytes: number): void {
    this.done = bytes
    const now = performance.now()
    if (now - this.shownAt < (this.terminal ? REDRAW_MS : LINE_MS)) return
    this.shownAt = now
    if (this.terminal) process.stderr.write(`\r\x1b[K${this.line()}`)
    else info(this.line())
  }

  /** Ends the bar's line, or says what was transferred. */
  finish(): void {
    if (this.terminal) process.stderr.write(`\r\x1b[K${this.line()}\n`)
    else info(this.line())
  }

  /** Ends the bar's line where the transfer broke off. */
  fail(): void {
    if (this.terminal) process.stderr.write('\n')
  }

  private line(): string {
    const seconds = Math.max(1e-3, (performance.now() - this.started) / 1000)
    const speed = (this.done - this.before) / seconds
    const rate = `${(speed / 1e6).toFixed(1)} MB/s`
    if (!this.total) return `${this.label} ${formatBytes(this.done)} ${rate}`
    const part = Math.min(1, this.done / this.total)
    const cells = Math.round(part * BAR_CELLS)
    const bar = '█'.repeat(cells) + '░'.repeat(BAR_CELLS - cells)
    const percent = `${Math.floor(part * 100)}%`.padStart(4)
    const left = speed > 0 ? (this.total - this.done) / speed : Infinity
    const eta =
      this.done < this.total ? ` ETA ${formatSeconds(left)}` : ` ${formatBytes(this.total)}`
    return `${this.label} ${bar} ${percent} ${rate}${eta}`
  }
}

const UNITS = ['B', 'kB', 'MB', 'GB', 'TB']

/** Decimal units with three digits, as download pages show sizes: 98.4 MB. */
export function formatBytes(bytes: number): string {
  const power = Math.min(UNITS.length - 1, Math.floor(Math.log10(Math.max(1, bytes)) / 3))
  const value = bytes / 1000 ** power
  return `${power === 0 ? value : value.toPrecision(3)} ${UNITS[power]}`
}

function formatSeconds(seconds: number): string {
  if (!Number.isFinite(seconds)) return '–'
  const whole = Math.ceil(seconds)
  return whole < 60
    ? `${whole}s`
    : `${Math.floor(whole / 60)}m${String(whole % 60).padStart(2, '0')}s`
}
