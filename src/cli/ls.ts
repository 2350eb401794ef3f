// Owns `lattice ls`: shows the models in the local store.

import { Command } from 'commander'
import { formatBytes } from '../model/pull/progress.ts'
import { type Manifest, Store } from '../model/store.ts'

export function lsCommand(): Command {
  return new Command('ls')
    .description('list the models in the local store')
    .option('--json', 'print a JSON array of manifests, with absolute paths')
    .action(async (options: { json?: boolean }) => {
      const store = new Store()
      const models = await store.list()
      if (options.json) {
        const shown = models.map((model) => ({ ...model, paths: store.paths(model) }))
        process.stdout.write(`${JSON.stringify(shown, undefined, 2)}\n`)
        return
      }
      const incomplete = await store.incomplete()
      if (models.length + incomplete.length === 0) {
        process.stdout.write(`No models in ${store.root}. Fetch one with \`lattice pull\`.\n`)
        return
      }
      const rows = [
        ['NAME', 'SIZE', 'FORMAT', 'ARCH', 'QUANT', 'SOURCE', 'PULLED'],
        ...models.map(row),
        ...incomplete.map(({ name, byteLength }) => [
          name,
          formatBytes(byteLength),
          '–',
          '–',
          '–',
          'incomplete: pull it again',
          '–',
        ]),
      ]
      process.stdout.write(`${table(rows)}\n`)
    })
}

function row({ name, files, about, source, date }: Manifest): string[] {
  const size = files.reduce((sum, file) => sum + file.byteLength, 0)
  const { format = '?', architecture = '?', quantization = '?' } = about ?? {}
  return [name, formatBytes(size), format, architecture, quantization, source, age(date)]
}

const STEPS = [
  ['day', 86_400],
  ['hour', 3600],
  ['minute', 60],
] as const

/** How long ago, in the largest unit that fits: "3 hours ago". */
export function age(date: string, now: number = Date.now()): string {
  const seconds = Math.max(0, (now - Date.parse(date)) / 1000)
  for (const [unit, length] of STEPS) {
    const count = Math.floor(seconds / length)
    if (count > 0) return `${count} ${unit}${count === 1 ? '' : 's'} ago`
  }
  return 'just now'
}

/** Left-aligned columns, two spaces apart. */
function table(rows: readonly (readonly string[])[]): string {
  const widths = (rows[0] ?? []).map((_, column) =>
    Math.max(...rows.map((cells) => (cells[column] ?? '').length)),
  )
  return rows
    .map((cells) => cells.map((cell, column) => cell.padEnd(widths[column] ?? 0)).join('  '))
    .map((line) => line.trimEnd())
    .join('\n')
}
