// Catches documents that tell a newcomer to run what is not there.

import assert from 'node:assert/strict'
import { existsSync, globSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { test } from 'node:test'
import { helpOf, withCurrentHelp } from '../../tools/cli-docs.ts'
import { read, ROOT, UNTIL_BUILT } from './sources.ts'

const DOCUMENTS = globSync('{*.md,docs/**/*.md}', { cwd: ROOT }).toSorted()
const scripts = (JSON.parse(read('package.json')) as { scripts: Record<string, string> }).scripts
/** npm's own commands that a document may tell a reader to run. */
const NPM_COMMANDS = new Set(['ci', 'install', 'link'])

for (const document of DOCUMENTS) {
  const commands = shellLines(read(document))

  test(`the npm commands of ${document} exist`, () => {
    for (const line of commands.filter((command) => /^npm\b/.test(command))) {
      const [, name = '', script = ''] = line.split(/\s+/)
      const known = name === 'run' ? script in scripts : name in scripts
      assert.ok(known || NPM_COMMANDS.has(name), `"${line}" is no script of package.json`)
    }
  })

  test(`the lattice commands and options of ${document} exist`, async () => {
    for (const line of commands.filter((command) => /^(bin\/)?lattice\b/.test(command))) {
      // What is quoted is a value, and behind a pipe or redirection it is no longer lattice.
      const words = line
        .replaceAll(/"[^"]*"|'[^']*'/g, 'VALUE')
        .split(/[|>#]/)[0]!
        .trim()
        .split(/\s+/)
      const path = await commandPath(words.slice(1))
      const help = await helpOf(path)
      for (const option of words.filter((word) => /^--?[a-z]/i.test(word))) {
        const name = option.split('=')[0]!
        const listed = new RegExp(`(^|\\s|,)${name}(\\s|,|$)`, 'm').test(help)
        assert.ok(listed, `"${line}": lattice ${path.join(' ')} has no option ${name}`)
      }
    }
  })

  test(`the links of ${document} lead somewhere`, () => {
    for (const [, target = ''] of read(document).matchAll(/\]\(([^)#\s]+)[^)]*\)/g)) {
      if (/^[a-z]+:/.test(target)) continue
      assert.ok(existsSync(join(ROOT, dirname(document), target)), `${target} is not there`)
    }
  })

  test(`the source files that ${document} names exist`, { skip: UNTIL_BUILT }, () => {
    for (const [, path = ''] of read(document).matchAll(/`((?:src|test|tools|docs)\/[\w./-]+)`/g)) {
      assert.ok(existsSync(join(ROOT, path)), `${path} is not there`)
    }
  })
}

test('docs/cli.md holds the help that the program prints', async () => {
  const text = read('docs/cli.md')
  assert.equal(
    text,
    await withCurrentHelp(text),
    'Run: node_modules/.bin/node tools/cli-docs.ts (it writes the help texts anew).',
  )
})

/** The lines of all ```sh blocks, joined where a backslash continues them. */
function shellLines(text: string): string[] {
  return [...text.matchAll(/```sh\n([^]*?)```/g)]
    .flatMap(([, block = '']) => block.replaceAll(/\\\n\s*/g, ' ').split('\n'))
    .map((line) => line.replace(/^\$ /, '').trim())
}

/** ['bench', 'serve', '--url', …] → ['bench', 'serve'] */
async function commandPath(words: readonly string[]): Promise<string[]> {
  const path: string[] = []
  for (const word of words) {
    const help = await helpOf(path)
    if (!new RegExp(`^ {2}${word}\\b`, 'm').test(help) || !/^[a-z]/.test(word)) break
    path.push(word)
  }
  assert.ok(path.length > 0 || words.every((word) => word.startsWith('-')), `lattice ${words[0]}?`)
  return path
}
