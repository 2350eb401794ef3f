// Owns what the house tests look at: the project's files, their text and what they import.

import { execFileSync } from 'node:child_process'
import { existsSync, globSync, readFileSync } from 'node:fs'
import { dirname, join, normalize } from 'node:path'
import { fileURLToPath } from 'node:url'

export const ROOT = fileURLToPath(new URL('../../', import.meta.url))

export interface Source {
  /** Relative to the project's root. */
  path: string
  text: string
  /** Files of the project that it imports or starts as a worker, and packages. */
  imports: Import[]
}

export interface Import {
  /** A path relative to the root, or a package's or builtin's name. */
  target: string
  /** Loaded only when the code asks for it: import() or a worker. */
  lazy: boolean
}

/** All code: src, test, tools, bench, kernels, native. */
export const sources: readonly Source[] = globSync(
  ['{src,test,tools,bench}/**/*.{ts,mjs}', 'kernels/*.{cu,cuh}', 'native/*.{c,h}'],
  {
    cwd: ROOT,
  },
)
  .toSorted()
  .map((path) => {
    const text = read(path)
    return { path, text, imports: importsOf(path, text) }
  })

export const byPath: ReadonlyMap<string, Source> = new Map(
  sources.map((source) => [source.path, source]),
)

/**
 * Some module is still a stand-in. Rules about the whole (every code used, every named file
 * there) wait for the last one to go.
 */
const STAND_INS: readonly string[] = sources
  .filter(({ path, text }) => path.startsWith('src/') && text.includes("'not built yet'"))
  .map(({ path }) => path)

/** Why a rule about the whole is skipped; false when nothing is missing. */
export const UNTIL_BUILT: string | false =
  STAND_INS.length > 0 &&
  `until ${STAND_INS[0]} and ${STAND_INS.length - 1} other stand-ins are built`

export function isTest(path: string): boolean {
  return path.endsWith('.test.ts') || path.startsWith('test/')
}

export function read(path: string): string {
  return readFileSync(join(ROOT, path), 'utf8')
}

/** Every text file that is or would be committed; in a copy without git, all code and documents. */
export function textFiles(): string[] {
  const listed = existsSync(join(ROOT, '.git'))
    ? execFileSync('git', ['ls-files', '-co', '--exclude-standard'], {
        cwd: ROOT,
        encoding: 'utf8',
      })
        .split('\n')
        .filter((path) => path !== '' && existsSync(join(ROOT, path)))
    : globSync('{*.md,*.json,bin/*,{src,test,tools,bench,docs,kernels}/**/*.*}', { cwd: ROOT })
  return listed.filter((path) => !path.startsWith('node_modules') && !read(path).includes('\0'))
}

/** The files that can be reached from others by imports, lazy ones included unless told. */
export function reachable(
  from: readonly string[],
  follow: (importer: string, imported: Import) => boolean = () => true,
): Set<string> {
  const seen = new Set<string>()
  const queue = [...from]
  for (let path = queue.pop(); path !== undefined; path = queue.pop()) {
    if (seen.has(path)) continue
    seen.add(path)
    for (const imported of byPath.get(path)?.imports ?? []) {
      if (byPath.has(imported.target) && follow(path, imported)) queue.push(imported.target)
    }
  }
  return seen
}

function importsOf(path: string, text: string): Import[] {
  const code = text.replaceAll(/\/\*[^]*?\*\/|^\s*\/\/.*$/gm, '')
  const found: Import[] = []
  // import … from 'x', export … from 'x', import 'x'; then import('x'), new URL('x', import.meta…)
  for (const match of code.matchAll(/^(?:import|export)\b(?:[^'";]*?\bfrom)?\s*'([^']+)'/gm)) {
    found.push({ target: resolve(path, match[1]!), lazy: false })
  }
  for (const match of code.matchAll(/\bimport\(\s*'([^']+)'|new URL\(\s*'([^']+)'/g)) {
    found.push({ target: resolve(path, (match[1] ?? match[2])!), lazy: true })
  }
  return found
}

function resolve(importer: string, specifier: string): string {
  const relative = specifier.startsWith('.') || byPathExists(importer, specifier)
  return relative ? normalize(join(dirname(importer), specifier)) : specifier
}

/** new URL('worker.ts', …) is relative without a dot. */
function byPathExists(importer: string, specifier: string): boolean {
  return specifier.endsWith('.ts') && existsSync(join(ROOT, dirname(importer), specifier))
}
