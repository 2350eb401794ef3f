// Owns the help texts in docs/cli.md: each ```text block that begins with "$ lattice … --help" is
// written anew from what the program prints.

import { execFile } from 'node:child_process'
import { readFileSync, writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'

const MAIN = fileURLToPath(new URL('../src/main.ts', import.meta.url))
const DOCUMENT = new URL('../docs/cli.md', import.meta.url)
const HELP_BLOCK = /```text\n\$ lattice ([a-z ]*)--help\n[^]*?```/g

const helps = new Map<string, Promise<string>>()

if (import.meta.main) {
  writeFileSync(DOCUMENT, await withCurrentHelp(readFileSync(DOCUMENT, 'utf8')))
}

/** What `lattice COMMAND --help` prints. */
export function helpOf(command: readonly string[]): Promise<string> {
  const name = command.join(' ')
  const help =
    helps.get(name) ??
    promisify(execFile)(process.execPath, [MAIN, ...command, '--help']).then(({ stdout }) => stdout)
  helps.set(name, help)
  return help
}

/** The document with the help that the program prints today. */
export async function withCurrentHelp(text: string): Promise<string> {
  const blocks = [...text.matchAll(HELP_BLOCK)]
  const written = await Promise.all(
    blocks.map(async ([, command = '']) => {
      const help = await helpOf(command.split(' ').filter((word) => word !== ''))
      return `\`\`\`text\n$ lattice ${command}--help\n${help.trimEnd()}\n\`\`\``
    }),
  )
  return text.replaceAll(HELP_BLOCK, () => written.shift()!)
}
