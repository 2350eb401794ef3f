// Catches code that drifts from the house's style. Every message says what to do instead.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { isTest, read, reachable, ROOT, sources, textFiles, UNTIL_BUILT } from './sources.ts'

const LINES_MAX = 500
const COLUMNS_MAX = 100
/** What nothing of the product imports: a command each, or compiled. */
const OUTSIDE = /^(tools|bench|native|test\/soak)\//

test(`no file is longer than ${LINES_MAX} lines`, () => {
  complain(
    sources
      .filter(({ text }) => text.split('\n').length > LINES_MAX)
      .map(({ path, text }) => `${path} has ${text.split('\n').length} lines`),
    'Split it where its opening sentence would need an "and".',
  )
})

test(`no line is longer than ${COLUMNS_MAX} columns`, () => {
  complain(
    sources.flatMap(({ path, text }) =>
      text
        .split('\n')
        .map((line, i) => ({ at: `${path}:${i + 1}`, columns: [...line].length }))
        .filter(({ columns }) => columns > COLUMNS_MAX)
        .map(({ at, columns }) => `${at} has ${columns} columns`),
    ),
    'Run oxfmt; break what it leaves (comments and strings) by hand.',
  )
})

test('a kernel’s oracle is not there', () => {
  const all = new Set(sources.map(({ path }) => path))
  complain(
    sources
      .filter(({ path }) => path.startsWith('kernels/'))
      .flatMap(({ path, text }) =>
        [...text.matchAll(/test\/[\w/.-]+\.ts/g)].map(([oracle]) => ({ path, oracle })),
      )
      .filter(({ oracle }) => !all.has(oracle))
      .map(({ path, oracle }) => `${path} names ${oracle}`),
    'Name the test that compares it with something else.',
  )
})

test('every file says what it owns', () => {
  complain(
    sources
      .filter(({ path }) => !/\.(test|gpu)\.ts$/.test(path))
      .filter(({ text }) => !/^(#!.*\n)?\/\/ Owns \S/.test(text))
      .map(({ path }) => path),
    'Open it with one sentence: "// Owns the …".',
  )
})

test('no file is dead', { skip: UNTIL_BUILT }, () => {
  const manifest = JSON.parse(read('package.json')) as { exports?: unknown }
  const exported = JSON.stringify(manifest.exports ?? '').matchAll(/"\.\/(src\/[^"]+)"/g)
  const roots = [
    'src/main.ts',
    ...[...exported].map((match) => match[1]!),
    ...sources.map(({ path }) => path).filter((path) => /\.(test|gpu)\.ts$/.test(path)),
    ...sources.map(({ path }) => path).filter(isNamedKernel),
    ...sources.map(({ path }) => path).filter((path) => OUTSIDE.test(path)),
  ]
  // x.test.ts does not vouch for the x.ts beside it: code that only its test runs is dead.
  const alive = reachable(roots, (importer, { target }) => {
    return importer.replace(/\.test\.ts$/, '.ts') !== target
  })
  complain(
    sources.map(({ path }) => path).filter((path) => !alive.has(path)),
    'Delete it, or import it where it was meant to be used (its own test does not count).',
  )
})

/** Kernels are not imported: product code names their files, and they include headers. */
function isNamedKernel(path: string): boolean {
  const file = path.replace(/^kernels\//, '')
  if (file === path) return false
  return sources.some(({ path: by, text }) => by !== path && text.includes(file))
}

test('nothing is left for later in a comment', () => {
  const later = /\b(TODO|FIXME|XXX|HACK)\b/
  complain(matches(later), 'Do it now, or say in the issue tracker what is missing.')
})

test('no test is run alone', () => {
  complain(
    sources
      .filter(({ path, text }) => isTest(path) && /\b(test|it|describe|suite)\.only\(/.test(text))
      .map(({ path }) => path),
    'Remove .only; `npm test -- PATTERN` runs some files.',
  )
})

test('nothing names a machine or a package registry', () => {
  const paths = '(^|[\\s\'"`(=:])/(root|work|home)/'
  const hosts = ['npmjs', 'pypi', 'python[h]osted'].map((name) => `\\b${name}\\.(org|com)\\b`)
  const names = new RegExp([paths, ...hosts].join('|'), 'i')
  complain(
    matches(names),
    "Go through the user's own npm or pip; take paths from options or the environment.",
  )
})

/** Places where a pattern occurs in any text file but this one. */
function matches(pattern: RegExp): string[] {
  return textFiles()
    .filter((path) => !['package-lock.json', 'test/house/tidy.test.ts'].includes(path))
    .flatMap((path) =>
      read(path)
        .split('\n')
        .map((line, i) => ({ line, at: `${path}:${i + 1}` }))
        .filter(({ line }) => pattern.test(line))
        .map(({ line, at }) => `${at} has "${pattern.exec(line)?.[0].trim()}"`),
    )
}

function complain(places: readonly string[], todo: string): void {
  assert.ok(places.length === 0, `in ${ROOT}:\n  ${places.join('\n  ')}\n→ ${todo}`)
}
