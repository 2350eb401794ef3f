// Catches an import that goes against the layers: policy that touches the machine, foreign calls
// outside ffi/, code that depends on the command line, a help text that loads an engine.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { type Import, isTest, reachable, type Source, sources } from './sources.ts'

const product = sources.filter(({ path }) => path.startsWith('src/') && !isTest(path))

/** What a datagram means and what follows from it; the other files of net/ are its machinery. */
const PURE_NET = new Set(
  [
    'exchange',
    'frame',
    'ingress-maps',
    'intake',
    'join-frames',
    'numbered',
    'protocol',
    'replica',
    'siphash',
    'siphash-wasm',
    'turns',
  ].map((name) => `src/net/${name}.ts`),
)

test('scheduler/ and kv/ are pure policy', () => {
  complain(
    (source, { target }) =>
      /^src\/(scheduler|kv)\//.test(source.path) &&
      !/^src\/((scheduler|kv)\/|(errors|limits|assert)\.ts$)/.test(target),
    'They import each other, errors, limits and assert only: pass in what they need (also time).',
  )
})

test('the datagram protocol is pure where it can be', () => {
  complain(
    (source, { target }) =>
      PURE_NET.has(source.path) &&
      !PURE_NET.has(target) &&
      !/^src\/(errors|limits|assert|wasm)\.ts$/.test(target),
    'These run the same in tests: pass in sockets, frames and time.',
  )
})

test('only ffi/ calls foreign code', () => {
  complain(
    (source, { target }) =>
      !source.path.startsWith('src/ffi/') && /^(koffi|node:ffi)(\/|$)/.test(target),
    'Declare the function in src/ffi/ and import it from there.',
  )
})

test('only main.ts knows the command line', () => {
  complain(
    (source, { target }) =>
      target.startsWith('src/cli/') && !/^src\/(main\.ts$|cli\/)/.test(source.path),
    'Move what is shared out of src/cli/, into the module that it is about.',
  )
})

test('the product does not depend on its tests or tools', () => {
  complain(
    (_source, { target }) => /^(test|tools|bench)\//.test(target) || target.endsWith('.test.ts'),
    'Move what is shared into src/.',
  )
})

test('the packages that the product imports are run-time dependencies', async () => {
  const { default: manifest } = (await import('../../package.json', {
    with: { type: 'json' },
  })) as { default: { dependencies: Record<string, string> } }
  complain(
    (_source, { target }) =>
      !/^(src|bpf|native|node:|\.\.|\/)/.test(target) &&
      !target.endsWith('.json') &&
      !Object.keys(manifest.dependencies).some(
        (name) => target === name || target.startsWith(`${name}/`),
      ),
    'npm start installs no development packages: do without, or move it to dependencies.',
  )
})

test('the help loads no command, so that it is instant', () => {
  const loaded = [...reachable(['src/main.ts'], (_, { lazy }) => !lazy)].toSorted()
  assert.deepEqual(
    loaded,
    ['src/cli/report.ts', 'src/errors.ts', 'src/main.ts', 'src/version.ts'],
    'main.ts imports a command lazily, inside `load`.',
  )
})

function complain(wrong: (source: Source, imported: Import) => boolean, todo: string): void {
  const places = product.flatMap((source) =>
    source.imports
      .filter((imported) => wrong(source, imported))
      .map(({ target }) => `${source.path} imports ${target}`),
  )
  assert.ok(places.length === 0, `\n  ${places.join('\n  ')}\n→ ${todo}`)
}
