import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { basename, join } from 'node:path'
import { after, test } from 'node:test'
import { temporaryDirectory } from '../../../test/support/temporary.ts'
import { startFileServer } from '../../../test/support/file-server.ts'
import { LatticeError } from '../../errors.ts'
import { download } from './download.ts'

const server = await startFileServer()
after(() => server.close())

/** 20 MiB: enough for four connections. */
const body = randomBytes(20 << 20)
const sha256 = createHash('sha256').update(body).digest('hex')

let next = 0

/** A file on the server under a new name, and how to fetch it into a new directory. */
function serve(settings: Partial<Parameters<typeof server.files.set>[1]> = {}) {
  const name = `file-${next++}.gguf`
  const file = { body, ...settings }
  server.files.set(`/${name}`, file)
  const directory = temporaryDirectory('download')
  const path = join(directory, name)
  const fetchIt = (extra: object = {}) =>
    download({
      url: `${server.url}/${name}`,
      headers: {},
      path,
      label: name,
      retryBaseMs: 1,
      ...extra,
    })
  const bodies = () => server.requests.filter((request) => request.startsWith(`/${name} `))
  return { file, path, directory, fetchIt, bodies }
}

async function refusal(run: Promise<unknown>): Promise<LatticeError> {
  try {
    await run
  } catch (thrown) {
    assert.ok(thrown instanceof LatticeError, String(thrown))
    return thrown
  }
  throw new Error('it worked')
}

test('a large file comes whole, over several connections at once', async () => {
  const { path, directory, fetchIt, bodies } = serve()
  const file = await fetchIt({ sha256, byteLength: body.byteLength })
  assert.deepEqual(file, { path, byteLength: body.byteLength, sha256 })
  assert.ok(readFileSync(path).equals(body))
  assert.equal(bodies().length, 1 + 4)
  assert.ok(server.mostAtOnce > 1)
  assert.deepEqual(readdirSync(directory), [path.slice(directory.length + 1)])
})

test('dropped connections go on where they broke, not where they began', async () => {
  const cuts = [1 << 20, 2 << 20, 3 << 20, 100_000, 5]
  const { path, fetchIt, bodies } = serve({ cutAfter: [...cuts] })
  await fetchIt({ sha256 })
  assert.ok(readFileSync(path).equals(body))
  const ranges = bodies()
    .slice(1)
    .map((request) => /bytes=(\d+)-(\d+)/.exec(request))
  assert.equal(ranges.length, 4 + cuts.length)
  // Each request asks for all that its segment lacks, so the starts of one segment's requests say
  // how far the one before came. What was on its way when a connection broke may come twice.
  const delivered = cuts.reduce((sum, cut) => sum + cut, 0)
  const kept = [...Map.groupBy(ranges, (range) => range?.[2]).values()].map((group) => {
    const starts = group.map((range) => Number(range?.[1]))
    return Math.max(...starts) - Math.min(...starts)
  })
  const progress = kept.reduce((sum, bytes) => sum + bytes, 0)
  assert.ok(progress <= delivered && progress > delivered * 0.8, `${progress} of ${delivered}`)
})

test('a download that gave up is not whole, and the next one only fetches what lacks', async () => {
  const { file, path, directory, fetchIt, bodies } = serve({ cutAfter: Array(40).fill(0) })
  file.cutAfter = [4 << 20, 4 << 20, 4 << 20, 4 << 20, ...Array<number>(40).fill(0)]
  const error = await refusal(fetchIt({ sha256 }))
  assert.equal(error.code, 'download_failed')
  assert.match(error.todo ?? '', /goes on where it stopped/)
  assert.equal(existsSync(path), false)
  assert.deepEqual(
    readdirSync(directory).map((name) => name.replace(/^file-\d+/, '')),
    ['.gguf.partial', '.gguf.partial.json'],
  )
  const state = JSON.parse(readFileSync(`${path}.partial.json`, 'utf8')) as {
    segments: { next: number; end: number }[]
  }
  const missing = state.segments.reduce((sum, segment) => sum + segment.end - segment.next, 0)
  assert.ok(missing < body.byteLength && missing > 0, String(missing))
  file.cutAfter = []
  const before = bodies().length
  await fetchIt({ sha256 })
  assert.ok(readFileSync(path).equals(body))
  const asked = bodies()
    .slice(before)
    .map((request) => /bytes=(\d+)-(\d+)/.exec(request))
  const bytes = asked.reduce((sum, range) => sum + Number(range?.[2]) - Number(range?.[1]) + 1, 0)
  assert.equal(bytes, missing + 1)
})

test('a file that changed on the server between two attempts is fetched anew', async () => {
  const { file, path, fetchIt } = serve({ cutAfter: Array(40).fill(1 << 20) })
  await refusal(
    fetchIt({ sha256, signal: AbortSignal.timeout(100) }).catch(() => {
      throw new LatticeError('internal', 'aborted')
    }),
  )
  const other = randomBytes(9 << 20)
  Object.assign(file, { body: other, etag: '"v2"', cutAfter: [] })
  await fetchIt()
  assert.ok(readFileSync(path).equals(other))
})

test('a file that changes during the download is an error, never a mixture', async () => {
  const { file, path, fetchIt } = serve({ cutAfter: [1 << 20, 1 << 20, 1 << 20, 1 << 20] })
  const started = fetchIt()
  const changed = setInterval(() => {
    if (file.cutAfter?.length === 0) Object.assign(file, { etag: '"v2"' })
  }, 1)
  const error = await refusal(started)
  clearInterval(changed)
  assert.match(error.message, /changed while it was fetched/)
  assert.equal(existsSync(path), false)
})

test('a wrong hash removes the file and names both hashes', async () => {
  const { directory, fetchIt } = serve()
  const wrong = '0'.repeat(64)
  const error = await refusal(fetchIt({ sha256: wrong }))
  assert.equal(error.code, 'hash_mismatch')
  assert.ok(error.message.includes(wrong) && error.message.includes(sha256))
  assert.deepEqual(readdirSync(directory), [])
})

test('a server without ranges works, and is asked again from the start if it drops', async () => {
  const { path, fetchIt, bodies } = serve({ ranges: false, cutAfter: [3 << 20] })
  await fetchIt({ sha256 })
  assert.ok(readFileSync(path).equals(body))
  assert.equal(bodies().length, 2)
})

test('404 and 401 are said at once, 503 and 429 are tried again', async () => {
  const lost = await refusal(
    download({ url: `${server.url}/none.gguf`, headers: {}, path: '/nowhere/x', label: 'x' }),
  )
  assert.deepEqual([lost.code, lost.details['status']], ['download_failed', 404])
  const secret = serve({ token: 'hf_1' })
  const denied = await refusal(secret.fetchIt())
  assert.equal(denied.details['status'], 401)
  assert.match(denied.todo ?? '', /HF_TOKEN/)
  await secret.fetchIt({ headers: { authorization: 'Bearer hf_1' }, sha256 })
  const busy = serve({ statuses: [503, 429, 500] })
  await busy.fetchIt({ sha256 })
  const dead = serve({ statuses: Array(20).fill(503) })
  assert.match((await refusal(dead.fetchIt())).message, /answered 503/)
})

test('a size other than the listing says is refused before it is fetched', async () => {
  const { fetchIt, bodies } = serve()
  const error = await refusal(fetchIt({ byteLength: 5 }))
  assert.match(error.message, /has 20971520 bytes, but its listing says 5/)
  assert.equal(bodies().length, 1)
})

test('a state file that is garbage does not matter', async () => {
  const { path, fetchIt } = serve()
  writeFileSync(`${path}.partial`, 'rubbish')
  writeFileSync(`${path}.partial.json`, '{"segments":[{"next":5,"end":1}]}')
  await fetchIt({ sha256 })
  assert.ok(readFileSync(path).equals(body))
})

test('small and empty files come too', async () => {
  const small = serve({ body: Buffer.from('ab') })
  assert.equal((await small.fetchIt()).byteLength, 2)
  const empty = serve({ body: Buffer.alloc(0), ranges: false })
  assert.equal((await empty.fetchIt()).byteLength, 0)
})

test('an abort ends it at once and leaves what is there for the next time', async () => {
  const { path, fetchIt } = serve({ cutAfter: Array(1000).fill(50_000) })
  const stop = new AbortController()
  setTimeout(() => stop.abort(new Error('stopped')), 60)
  await assert.rejects(fetchIt({ sha256, signal: stop.signal, retryBaseMs: 50 }), /stopped/)
  assert.equal(existsSync(path), false)
  assert.ok(existsSync(`${path}.partial.json`))
})

test('a process killed midway leaves nothing that looks whole, the next goes on', async () => {
  const { path, fetchIt } = serve({ holdAfter: Array<number>(4).fill(1 << 20) })
  const url = `${server.url}/${basename(path)}`
  const code = `import { download } from '${new URL('./download.ts', import.meta.url).href}'
    setTimeout(() => process.stdout.write('now'), 300)
    await download({ url: '${url}', headers: {}, path: '${path}', label: 'x' })`
  const child = spawn(process.execPath, ['--input-type=module', '-e', code])
  await once(child.stdout, 'data')
  child.kill('SIGKILL')
  await once(child, 'close')
  assert.equal(existsSync(path), false)
  assert.ok(existsSync(`${path}.partial.json`))
  await fetchIt({ sha256 })
  assert.ok(readFileSync(path).equals(body))
})
