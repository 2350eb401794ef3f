// Catches a client that goes while the server is busy and whose answer is computed all the same,
// and a `serve --kernel-disconnect` that leaves its cgroup behind or says nothing of why not.

import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { test, type TestContext } from 'node:test'
import { EngineClient } from '../../src/engine/client.ts'
import type { Engine, EngineSnapshot } from '../../src/engine/api.ts'
import type { LatticeError } from '../../src/errors.ts'
import { Disconnects, ownCgroup } from '../../src/net/disconnects.ts'
import { startServer } from '../../src/server/server.ts'
import { fakeTokenizer } from '../support/fake-tokenizer.ts'
import { temporaryDirectory } from '../support/temporary.ts'
import { ServeProcess } from '../support/serve-process.ts'
import { tinyLlama, writeTinyGguf } from '../support/tiny-gguf.ts'
import { WITHOUT_ROOT } from './namespaces.ts'

const STEP_MS = 10
/** After the client has gone. */
const BUSY_MS = 1000
const CONTEXT = 8192

function withoutCgroup(): string | false {
  if (WITHOUT_ROOT) return WITHOUT_ROOT
  try {
    Disconnects.open().close()
    return false
  } catch (thrown) {
    const { code, message } = thrown as LatticeError
    // Of this machine; a program that the kernel does not take is a failure.
    if (code === 'net_refused') return `SKIPPED: ${message}`
    throw thrown
  }
}

const skip = withoutCgroup()

/** Asks for a long answer; when told how, it goes, and writes down when it had gone. */
const CLIENT = `
const [port, path, body, file] = process.argv.slice(1)
const socket = require('node:net').connect(Number(port), '127.0.0.1')
socket.write('POST ' + path + ' HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/json\\r\\n' +
  'Content-Length: ' + Buffer.byteLength(body) + '\\r\\n\\r\\n' + body)
socket.once('data', () => console.log('answered'))
socket.on('error', () => {})
process.stdin.once('data', (how) => {
  const said = () => {
    require('node:fs').writeFileSync(file + '.new', String(process.hrtime.bigint()))
    require('node:fs').renameSync(file + '.new', file)
  }
  if (String(how).trim() === 'end') return socket.end(said)
  socket.resetAndDestroy()
  said()
})`

/** A client of a server here goes while this thread is busy; what the engine made of it. */
async function leaveWhileBusy(t: TestContext, how: 'reset' | 'end', watched: boolean) {
  const disconnects = watched ? Disconnects.open() : undefined
  const { vocabSize } = fakeTokenizer()
  const engine = await EngineClient.start(
    {
      backend: { kind: 'null', vocab: vocabSize, stepMs: STEP_MS },
      ...{ contextLength: CONTEXT, maxSequences: 2, stepTokens: 64, kvBytes: 16 << 20 },
      ...(disconnects && { disconnects: disconnects.ring }),
    },
    { id: 'null', architecture: 'none', contextLength: CONTEXT, vocabSize },
    { sequences: 8, contextLength: CONTEXT },
  )
  let submittedNs = 0n
  const submit = engine.submitChoices.bind(engine)
  engine.submitChoices = (request, choices) => {
    submittedNs = process.hrtime.bigint()
    return submit(request, choices)
  }
  const parts = { engine, tokenizer: fakeTokenizer(), template: undefined }
  const at = { host: '127.0.0.1', port: 0, kernelDisconnect: watched }
  const server = await startServer({ ...parts, ...at })
  const body = JSON.stringify({ prompt: 'hi', max_tokens: 6000, stream: true, ignore_eos: true })
  const { port } = new URL(server.url)
  const file = join(temporaryDirectory('gone'), 'went')
  const argv = ['-e', CLIENT, port, '/v1/completions', body, file]
  const client = spawn(process.execPath, argv, { stdio: ['pipe', 'pipe', 'inherit'] })
  t.after(async () => {
    client.kill('SIGKILL')
    await server.close()
    await engine.close()
    disconnects?.close()
  })
  await once(client.stdout, 'data')
  client.stdin.write(`${how}\n`)
  // The order has left: a pipe that has room is written to at once. From here on this thread
  // hears nothing; files it can see.
  while (!existsSync(file));
  const end = performance.now() + BUSY_MS
  while (performance.now() < end);
  const wentNs = BigInt(readFileSync(file, 'utf8'))
  const { finished, outputTokens } = await ended(engine)
  /** Steps that had begun when it went, at most: each takes longer than it says. */
  const stepsMax = Math.floor(Number(wentNs - submittedNs) / 1e6 / STEP_MS) + 1
  return { finished, outputTokens, stepsMax }
}

async function ended(engine: Engine): Promise<EngineSnapshot> {
  for (;;) {
    const snapshot = await engine.snapshot()
    if (snapshot.running === 0) return snapshot
    await new Promise((resolve) => setTimeout(resolve, 5))
  }
}

for (const how of ['reset', 'end'] as const) {
  test(`a client’s ${how} is not heard while the server is busy`, { skip }, async (t) => {
    const { finished, outputTokens, stepsMax } = await leaveWhileBusy(t, how, true)
    t.diagnostic(`${outputTokens} tokens, ${stepsMax} steps had begun at most`)
    assert.equal(finished.abort, 1)
    assert.ok(outputTokens <= stepsMax, `${outputTokens} tokens of ${stepsMax} steps`)
  })
}

test('without the kernel’s word the test above would see nothing', { skip }, async (t) => {
  const { finished, outputTokens, stepsMax } = await leaveWhileBusy(t, 'reset', false)
  t.diagnostic(`${outputTokens} tokens, ${stepsMax} steps had begun at most`)
  assert.equal(finished.abort, 1)
  assert.ok(outputTokens > stepsMax, `${outputTokens} tokens of ${stepsMax} steps`)
})

test('serve --kernel-disconnect leaves its cgroup, or loses clients', { skip }, async (t) => {
  const model = ['--model', writeTinyGguf(tinyLlama()), '--threads', '1', '--kernel-disconnect']
  const serve = new ServeProcess(model, {})
  t.after(() => serve.kill())
  await serve.ready()
  const response = await fetch(`${serve.url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ prompt: 'hello', max_tokens: 5, ignore_eos: true }),
  })
  const { usage } = (await response.json()) as { usage: { completion_tokens: number } }
  assert.equal(usage.completion_tokens, 5)
  assert.match(readFileSync(`/proc/${serve.pid}/cgroup`, 'utf8'), /^0::.*\/lattice-\d+$/m)
  const folder = `${ownCgroup()}/lattice-${serve.pid}`
  assert.ok(existsSync(folder))
  await serve.stop()
  assert.ok(!existsSync(folder))
})

test('a killed server’s cgroup stays for ever', { skip }, async (t) => {
  const program = `
    const { Disconnects } = await import(process.argv[1])
    Disconnects.open()
    console.log('open')
    setInterval(() => {}, 1000)`
  const url = new URL('../../src/net/disconnects.ts', import.meta.url).href
  const argv = ['--input-type=module', '-e', program, url]
  const child = spawn(process.execPath, argv, { stdio: ['ignore', 'pipe', 'inherit'] })
  t.after(() => child.kill('SIGKILL'))
  await once(child.stdout, 'data')
  const folder = `${ownCgroup()}/lattice-${child.pid}`
  assert.ok(existsSync(folder))
  child.kill('SIGKILL')
  await once(child, 'exit')
  assert.ok(existsSync(folder))
  Disconnects.open().close()
  assert.ok(!existsSync(folder))
})

test('where there is no cgroup v2 that is not said', { skip: WITHOUT_ROOT }, () => {
  const net = { code: 'net_refused' }
  assert.throws(() => ownCgroup('24 1 0:22 / /proc rw - proc proc rw\n', '0::/\n'), net)
  const mounts = '34 24 0:29 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n'
  assert.equal(ownCgroup(mounts, '1:cpu:/\n0::/a/b\n'), '/sys/fs/cgroup/a/b')
  assert.throws(() => Disconnects.open('/proc/self'), { ...net, message: /No cgroup can be made/ })
})
