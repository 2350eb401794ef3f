// Owns how sizes, times and tables look in a terminal.

/** A size in bytes with a binary unit and three significant digits: 1.5 GiB. */
export function formatBytes(bytes: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB']
  let unit = 0
  while (bytes >= 1023.5 && unit < units.length - 1) {
    bytes /= 1024
    unit++
  }
  return `${Number(bytes.toPrecision(bytes < 1000 ? 3 : 4))} ${units[unit]}`
}

/** A duration in the largest fitting unit: 340 ms, 2.1 s, 3 min 5 s. */
export function formatMs(ms: number): string {
  if (ms < 999.5) return `${Math.round(ms)} ms`
  if (ms < 59_950) return `${(ms / 1000).toFixed(1)} s`
  const seconds = Math.round(ms / 1000)
  return `${Math.floor(seconds / 60)} min ${seconds % 60} s`
}

/** Rows under a heading, columns aligned: numbers (`right`) to the right, text to the left. */
export function formatTable(
  columns: readonly { title: string; right?: boolean }[],
  rows: readonly (readonly string[])[],
): string {
  const lines = [columns.map((column) => column.title), ...rows]
  const widths = columns.map((_, i) => Math.max(...lines.map((line) => line[i]?.length ?? 0)))
  return lines
    .map((line) =>
      columns
        .map(({ right }, i) => {
          const cell = line[i] ?? ''
          return right ? cell.padStart(widths[i]!) : cell.padEnd(widths[i]!)
        })
        .join('  ')
        .trimEnd(),
    )
    .join('\n')
}
