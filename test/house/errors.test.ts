// Catches an error code that is undocumented, documented wrongly, or that nothing throws any more.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { ERROR_CODES } from '../../src/errors.ts'
import { isTest, read, sources, UNTIL_BUILT } from './sources.ts'

test('docs/errors.md documents every code, in the order of the registry, and no other', () => {
  const documented = [...read('docs/errors.md').matchAll(/^### `(\w+)`$/gm)].map(([, code]) => code)
  assert.deepEqual(
    documented,
    Object.keys(ERROR_CODES),
    'Make the headings of docs/errors.md those of ERROR_CODES in src/errors.ts.',
  )
})

test('the documented statuses and exit codes are the real ones', () => {
  for (const [code, { status, exit }] of Object.entries(ERROR_CODES)) {
    assert.ok(
      read('docs/errors.md').includes(`### \`${code}\`\n\nHTTP ${status}, exit code ${exit}.`),
      `Write under ${code} in docs/errors.md: HTTP ${status}, exit code ${exit}.`,
    )
  }
})

test('every code is thrown somewhere', { skip: UNTIL_BUILT }, () => {
  const product = sources.filter(({ path }) => path.startsWith('src/') && !isTest(path))
  const unused = Object.keys(ERROR_CODES).filter(
    (code) => !product.some(({ path, text }) => path !== 'src/errors.ts' && uses(text, code)),
  )
  assert.deepEqual(unused, [], 'Delete these codes from src/errors.ts and docs/errors.md.')
})

function uses(text: string, code: string): boolean {
  return text.includes(`'${code}'`)
}
