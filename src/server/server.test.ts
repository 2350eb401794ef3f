import assert from 'node:assert/strict'
import { connect, type Socket } from 'node:net'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { test } from 'node:test'
import { fakeServer } from '../../test/support/fake-server.ts'
import { over, post, until } from '../../test/support/http.ts'

const CHAT = '/v1/chat/completions'
const BODY = { messages: [{ role: 'user', content: 'hi' }] }
const ENDLESS = { ...BODY, ignore_eos: true }

/** An answer that takes seconds: to be left before its end. */
const SLOW = { contextLength: 4096, stepMs: 2 }

function request(body: object, path = CHAT): string {
  const json = JSON.stringify(body)
  const length = Buffer.byteLength(json)
  return (
    `POST ${path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n` +
    `Content-Length: ${length}\r\n\r\n${json}`
  )
}

/** A socket on which `text` was sent; `received` grows with what comes back. */
async function raw(
  url: string,
  text: string | Buffer,
): Promise<{ socket: Socket; received(): string }> {
  const { hostname, port } = new URL(url)
  const socket = connect(Number(port), hostname)
  let received = ''
  socket.on('data', (chunk) => (received += chunk.toString('latin1')))
  socket.on('error', () => {})
  await new Promise((resolve) => socket.once('connect', resolve))
  socket.write(text)
  return { socket, received: () => received }
}

async function abortsWithin50Ms(
  server: Awaited<ReturnType<typeof fakeServer>>,
  leave: () => void,
  handles: number,
): Promise<void> {
  // What the machine itself held this process up for is not the server's.
  const delay = monitorEventLoopDelay({ resolution: 1 })
  delay.enable()
  const leftMs = performance.now()
  leave()
  await until('the abort', () => server.engine.aborts.length >= handles)
  await until('no sequence left', async () => {
    const { running, waiting } = await server.engine.snapshot()
    return running + waiting === 0
  })
  await new Promise((resolve) => setTimeout(resolve, 20))
  assert.equal(server.engine.aborts.length, handles, 'each handle is aborted once')
  delay.disable()
  const mostMs = 50 + (2 * delay.max) / 1e6
  for (const { atMs } of server.engine.aborts) {
    assert.ok(atMs - leftMs < mostMs, `${atMs - leftMs} of ${mostMs} ms`)
  }
}

test('a client that leaves its stream ends the sequence within 50 ms, once', async () => {
  await using server = await fakeServer(SLOW)
  const { socket, received } = await raw(server.url, request({ ...ENDLESS, stream: true }))
  await until('some tokens', () => received().includes('"content":"e"'))
  await abortsWithin50Ms(server, () => socket.destroy(), 1)
  const metrics = await (await fetch(`${server.url}/metrics`)).text()
  assert.match(metrics, /lattice_request_aborts_total\{cause="disconnect"\} 1/)
  assert.match(metrics, /lattice_request_success_total\{finished_reason="abort"\} 1/)
})

test('a client that leaves before a whole answer ends all its choices', async () => {
  await using server = await fakeServer(SLOW)
  const { socket } = await raw(server.url, request({ ...ENDLESS, n: 3 }))
  await until('the start', async () => (await server.engine.snapshot()).running === 3)
  await abortsWithin50Ms(server, () => socket.destroy(), 3)
})

test('a client that leaves the queue is taken out of it', async () => {
  await using server = await fakeServer({ ...SLOW, maxRunning: 0 })
  const { socket } = await raw(server.url, request({ ...ENDLESS, stream: true }))
  await until('the queue', async () => (await server.engine.snapshot()).waiting === 1)
  await abortsWithin50Ms(server, () => socket.destroy(), 1)
})

test('a client that half-closes has left too, as have its pipelined requests', async () => {
  await using server = await fakeServer(SLOW)
  const { socket } = await raw(server.url, request(ENDLESS) + request(ENDLESS))
  await until('both', async () => (await server.engine.snapshot()).running === 2)
  await abortsWithin50Ms(server, () => socket.end(), 2)
})

test('a client that does not read is cut off before its stream fills the memory', async () => {
  const megabytes = 64
  await using server = await fakeServer({ contextLength: megabytes << 20 })
  const { socket } = await raw(server.url, '')
  socket.pause()
  // Every token of n = 128 choices is a frame: far more than the kernel's buffers hold.
  socket.write(request({ ...ENDLESS, stream: true, n: 60, logprobs: true, top_logprobs: 20 }))
  const before = process.memoryUsage.rss()
  await until('the cut', () => server.engine.aborts.length === 60)
  assert.ok(process.memoryUsage.rss() - before < 200e6)
  const metrics = await (await fetch(`${server.url}/metrics`)).text()
  assert.match(metrics, /lattice_request_aborts_total\{cause="slow_reader"\} 1/)
  socket.destroy()
})

test('drain: probes turn, new requests are refused, the running stream finishes', async () => {
  await using server = await fakeServer({ stepMs: 2, reply: () => 'x'.repeat(100) })
  const stream = await fetch(`${server.url}${CHAT}`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ ...BODY, stream: true }),
  })
  assert.equal((await fetch(`${server.url}/readyz`)).status, 200)
  const drained = server.server.drain()
  const ready = await fetch(`${server.url}/readyz`)
  assert.equal(ready.status, 503)
  assert.equal(ready.headers.get('connection'), 'close')
  assert.equal((await fetch(`${server.url}/livez`)).status, 200)
  const refused = await post(over(server.url), CHAT, BODY)
  assert.equal(refused.status, 503)
  assert.equal(refused.json.error.code, 'draining')
  assert.ok(Number(refused.headers.get('retry-after')) > 0)
  const text = await stream.text()
  assert.equal(text.match(/"content":"x"/g)?.length, 100)
  assert.ok(text.endsWith('data: [DONE]\n\n'))
  await drained
  await assert.rejects(fetch(`${server.url}/livez`))
})

test('drain closes idle keep-alive connections instead of waiting for them', async () => {
  await using server = await fakeServer()
  const idle = await raw(server.url, 'GET /livez HTTP/1.1\r\nHost: x\r\n\r\n')
  await until('an answer', () => idle.received().includes('alive'))
  const startMs = performance.now()
  await server.server.drain()
  assert.ok(performance.now() - startMs < 1000)
  await until('the close', () => idle.socket.closed)
})

test('close cuts what runs, and the sequence is aborted', async () => {
  const server = await fakeServer(SLOW)
  const { socket } = await raw(server.url, request({ ...ENDLESS, stream: true }))
  await until('the start', async () => (await server.engine.snapshot()).running === 1)
  await server.server.close()
  await until('the abort', () => server.engine.aborts.length === 1)
  await until('the cut', () => socket.closed)
  await server.engine.close()
})

test('what is not HTTP gets a 400 and a closed connection, and the server lives on', async () => {
  await using server = await fakeServer()
  const good = JSON.stringify(BODY)
  const head = `POST ${CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n`
  const garbage: [text: string | Buffer, status: RegExp][] = [
    [Buffer.from([0x16, 3, 1, 0, 0xff, 0, 0, 0]), /^HTTP\/1.1 400 /],
    ['GET\r\n\r\n', /^HTTP\/1.1 400 /],
    [`${head}Transfer-Encoding: chunked\r\n\r\nzz\r\n${good}`, /^HTTP\/1.1 400 /],
    [`${head}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n`, /^HTTP\/1.1 400 /],
    [`GET / HTTP/1.1\r\nHost: x\r\nX: ${'a'.repeat(70_000)}\r\n\r\n`, /^HTTP\/1.1 431 /],
    ['GET / HTTP/1.1\r\nHost: a b\r\n\r\n', /^HTTP\/1.1 400 [^]*"code":"invalid_request"/],
    ['GET /../\\x HTTP/1.1\r\nHost: x\r\n\r\n', /^HTTP\/1.1 (400|404) /],
    ['OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n', /^HTTP\/1.1 400 /],
    ['GET /livez HTTP/1.0\r\n\r\n', /^HTTP\/1.1 200 /],
  ]
  for (const [text, status] of garbage) {
    const { socket, received } = await raw(server.url, text)
    await until(`an answer to ${text.toString('latin1').slice(0, 80)}`, () =>
      status.test(received()),
    )
    socket.destroy()
  }
  assert.equal((await post(over(server.url), CHAT, BODY)).status, 200)
})

test('a body is refused by type, encoding, size and syntax', async () => {
  await using server = await fakeServer()
  const send = over(server.url)
  const cases: [body: unknown, headers: Record<string, string>, status: number, code: string][] = [
    [BODY, { 'content-type': 'text/plain' }, 415, 'unsupported_media_type'],
    [BODY, { 'content-type': 'application/json; charset=latin1' }, 415, 'unsupported_media_type'],
    [BODY, { 'content-encoding': 'gzip' }, 415, 'unsupported_media_type'],
    ['', {}, 400, 'invalid_request'],
    ['{', {}, 400, 'invalid_request'],
    ['[]', {}, 400, 'invalid_request'],
    ['null', {}, 400, 'invalid_request'],
    [`{"a":${'['.repeat(100_000)}${']'.repeat(100_000)}}`, {}, 400, 'invalid_request'],
    [`{"a":"${'x'.repeat(16 << 20)}"}`, {}, 413, 'body_too_large'],
  ]
  for (const [body, headers, status, code] of cases) {
    const answer = await post(send, CHAT, body, headers)
    assert.deepEqual([answer.status, answer.json.error.code], [status, code])
  }
  const invalidUtf8 = await fetch(`${server.url}${CHAT}`, {
    method: 'POST',
    headers: { 'content-type': 'application/json; charset=utf-8' },
    body: Buffer.from('{"model":"\xff"}', 'latin1'),
  })
  assert.match(await invalidUtf8.text(), /UTF-8/)
})

test('a chunked body is taken, and refused once it is too long', async () => {
  await using server = await fakeServer()
  const chunked = (pieces: Iterable<string>): Promise<Response> =>
    fetch(`${server.url}${CHAT}`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: ReadableStream.from([...pieces].map((piece) => Buffer.from(piece))),
      duplex: 'half',
    } as RequestInit)
  assert.equal((await chunked(JSON.stringify(BODY).match(/.{1,7}/g)!)).status, 200)
  const response = await chunked(Array(17).fill('x'.repeat(1 << 20)))
  assert.equal(response.status, 413)
})

test('API keys: 401 without one, open probes, a tenant for each key', async () => {
  const keys = ['alpha', 'beta']
  await using server = await fakeServer({}, { apiKeys: keys })
  const send = over(server.url)
  for (const authorization of ['', 'Bearer gamma', 'Basic alpha', 'Bearer alpha beta', 'Bearer ']) {
    const { status, headers, json } = await post(send, CHAT, BODY, { authorization })
    assert.equal(status, 401)
    assert.equal(headers.get('www-authenticate'), 'Bearer')
    assert.deepEqual([json.error.code, json.error.type], ['unauthorized', 'authentication_error'])
  }
  assert.equal((await fetch(`${server.url}/v1/models`)).status, 401)
  assert.equal((await fetch(`${server.url}/debug/sequences`)).status, 401)
  for (const path of ['/', '/livez', '/readyz', '/health', '/metrics']) {
    assert.equal((await fetch(`${server.url}${path}`)).status, 200)
  }
  for (const key of [...keys, 'alpha']) {
    const { status } = await post(send, CHAT, BODY, { authorization: `Bearer ${key}` })
    assert.equal(status, 200)
  }
  const [first, second, third] = server.engine.requests.map(({ tenant }) => tenant)
  assert.match(first!, /^key-[0-9a-f]{12}$/)
  assert.notEqual(first, second)
  assert.equal(first, third)
})

test('an API key that is empty or cannot be sent is refused at the start', async () => {
  await assert.rejects(fakeServer({}, { apiKeys: [''] }), { code: 'usage' })
  await assert.rejects(fakeServer({}, { apiKeys: ['a b'] }), { code: 'usage' })
})

test('a port that is taken is an error that says so', async () => {
  await using server = await fakeServer()
  const { port } = new URL(server.url)
  const again = fakeServer({}, { port: Number(port) })
  await assert.rejects(again, { code: 'usage', message: /EADDRINUSE/ })
})

test('an engine that does not answer makes the server unready, not silent', async () => {
  await using server = await fakeServer()
  server.engine.snapshot = () => Promise.reject(new Error('gone'))
  assert.equal((await fetch(`${server.url}/livez`)).status, 200)
  assert.equal((await fetch(`${server.url}/readyz`)).status, 503)
  const metrics = await (await fetch(`${server.url}/metrics`)).text()
  assert.match(metrics, /lattice_engine_up 0/)
})

test('a web page may ask that was not allowed to, or one that was may not', async () => {
  const here = 'http://localhost:3000'
  await using server = await fakeServer({}, { apiKeys: ['alpha'], allowOrigins: [here] })
  await using open = await fakeServer({}, { allowOrigins: ['*'] })
  await using shut = await fakeServer()
  const allowed = async (url: string, method: string, origin: string): Promise<string | null> => {
    const asks = { 'access-control-request-method': 'POST' }
    const headers = { origin, ...(method === 'OPTIONS' ? asks : {}) }
    const { headers: told } = await fetch(`${url}${CHAT}`, { method, headers })
    return told.get('access-control-allow-origin')
  }
  for (const method of ['OPTIONS', 'GET']) {
    assert.equal(await allowed(server.url, method, here), here, 'an error can be read, too')
    assert.equal(await allowed(server.url, method, 'http://elsewhere'), null)
    assert.equal(await allowed(open.url, method, 'http://elsewhere'), '*')
    assert.equal(await allowed(shut.url, method, here), null)
  }
  const headers = {
    origin: here,
    authorization: 'Bearer alpha',
    'content-type': 'application/json',
  }
  const body = JSON.stringify({ ...BODY, stream: true })
  const answer = await fetch(`${server.url}${CHAT}`, { method: 'POST', headers, body })
  assert.equal(answer.headers.get('access-control-allow-origin'), here)
  assert.match(answer.headers.get('access-control-expose-headers') ?? '', /x-request-id/i)
  assert.match(await answer.text(), /\[DONE\]/)
})

test('nobody can ask which version this is', async () => {
  await using server = await fakeServer({}, { apiKeys: ['alpha'] })
  const { version } = (await (await fetch(`${server.url}/version`)).json()) as { version: string }
  assert.match(version, /^\d+\.\d+\.\d+/)
})
