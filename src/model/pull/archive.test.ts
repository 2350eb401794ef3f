import assert from 'node:assert/strict'
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { temporaryDirectory } from '../../../test/support/temporary.ts'
import { xorshift } from '../../../test/support/tiny-gguf.ts'
import { LatticeError } from '../../errors.ts'
import { type Archive, openArchive } from './archive.ts'

/** Written by tools/goldens/archives.py with Python's zipfile and tarfile. */
const goldens = JSON.parse(
  readFileSync(new URL('../../../test/goldens/archives.json', import.meta.url), 'utf8'),
) as Record<string, string>

const BODY = Buffer.from(Array.from({ length: 256 * 40 }, (_, i) => i % 256))
const directory = temporaryDirectory('archive')

function write(name: string, ending: string, bytes: Uint8Array): string {
  const path = join(directory, `${name}${ending}`)
  writeFileSync(path, bytes)
  return path
}

async function contents(archive: Archive, name: string): Promise<Buffer> {
  const parts: Buffer[] = []
  for await (const part of archive.stream(name)) parts.push(part)
  return Buffer.concat(parts)
}

for (const kind of ['stored', 'deflated', 'zip64', 'streamed']) {
  test(`a ${kind} ZIP archive made by Python reads back`, async () => {
    const bytes = Buffer.from(goldens[kind] ?? '', 'base64')
    const archive = await openArchive(write(kind, '.whl', bytes))
    assert.deepEqual(archive.names, ['a/first.txt', 'a/model.gguf', 'a/empty'])
    assert.ok((await contents(archive, 'a/model.gguf')).equals(BODY))
    assert.equal((await contents(archive, 'a/first.txt')).toString(), 'first\n')
    assert.equal((await contents(archive, 'a/empty')).byteLength, 0)
    await archive.close()
  })
}

for (const kind of ['pax', 'gnu']) {
  test(`a ${kind} tarball made by Python reads back, long names too`, async () => {
    const bytes = Buffer.from(goldens[kind] ?? '', 'base64')
    const archive = await openArchive(write(kind, '.tgz', bytes))
    assert.equal(archive.names.length, 3)
    const long = archive.names[1] ?? ''
    assert.ok(long.length > 240 && long.endsWith('/model.gguf'))
    assert.ok((await contents(archive, long)).equals(BODY))
    assert.equal((await contents(archive, 'package/last')).toString(), 'x')
  })
}

test('2,000 damaged archives are refused with a typed error, or give the right bytes', async () => {
  const seed = Number(process.env['LATTICE_SEED'] ?? 20_260_104)
  console.log(`seed ${seed}`)
  const random = xorshift(seed)
  const below = (count: number) => Math.floor(Math.abs(random()) * count)
  let refused = 0
  const kinds = Object.keys(goldens)
  for (let round = 0; round < 2000; round++) {
    const kind = kinds[round % kinds.length] ?? ''
    const zip = kind !== 'pax' && kind !== 'gnu'
    let bytes = Buffer.from(goldens[kind] ?? '', 'base64')
    const at = below(bytes.byteLength)
    if (below(3) === 0) bytes = bytes.subarray(0, at)
    else bytes[at] = (bytes[at] ?? 0) ^ (1 << below(8))
    const path = write('damaged', zip ? '.whl' : '.tgz', bytes)
    let archive: Archive | undefined
    try {
      archive = await openArchive(path)
      const name = archive.names.find((entry) => entry.endsWith('model.gguf'))
      if (name !== undefined) assert.ok((await contents(archive, name)).equals(BODY))
    } catch (thrown) {
      if (!(thrown instanceof LatticeError)) {
        throw new Error(`seed ${seed}, round ${round}, ${kind}`, { cause: thrown })
      }
      assert.equal(thrown.code, 'download_failed')
      refused++
    } finally {
      await archive?.close()
    }
  }
  assert.ok(refused > 1000, `${refused} of 2,000 refused`)
})
