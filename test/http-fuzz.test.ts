import assert from 'node:assert/strict'
import { connect } from 'node:net'
import { test } from 'node:test'
import type { FakeEngine } from './support/fake-engine.ts'
import { fakeApp, fakeServer } from './support/fake-server.ts'
import { until } from './support/http.ts'
import { Random } from './support/random.ts'

const SEED = Number(process.env['LATTICE_FUZZ_SEED'] ?? 1)
const IN_PROCESS = 97_000
const ON_SOCKETS = 3_000
const IN_FLIGHT = 64
/** Ten times what it takes: then a request hangs. */
const HANG_MS = 180_000
/** Small, so that a valid mutation that asks for much is answered soon or refused. */
const ENGINE = { contextLength: 96, maxRunning: 1024, maxQueue: 1024 }

interface Probe {
  method: string
  path: string
  headers: Record<string, string>
  body: Buffer<ArrayBuffer> | undefined
}

const MESSAGES = [
  { role: 'system', content: 'be brief' },
  { role: 'user', content: [{ type: 'text', text: 'hi' }] },
]
const TOOL = { type: 'function', function: { name: 'f', parameters: { type: 'object' } } }
const CALL = { id: 'x', type: 'function', function: { name: 'f', arguments: '{"a":1}' } }

const POSTS: readonly (readonly [path: string, body: object])[] = [
  ['/v1/chat/completions', { model: 'fake/model', messages: MESSAGES, temperature: 0.5, top_p: 1 }],
  [
    '/v1/chat/completions',
    { messages: MESSAGES, stream: true, stream_options: { include_usage: true } },
  ],
  ['/v1/chat/completions', { messages: MESSAGES, logprobs: true, top_logprobs: 2, n: 2, seed: 1 }],
  [
    '/v1/chat/completions',
    {
      messages: [
        { role: 'assistant', content: null, tool_calls: [CALL] },
        { role: 'tool', tool_call_id: 'x', content: 'y' },
      ],
      tools: [TOOL],
      tool_choice: 'auto',
      stop: ['a', 'b'],
      logit_bias: { 65: 1 },
    },
  ],
  ['/v1/completions', { prompt: 'hi', max_tokens: 4, echo: true, stop: 'o' }],
  ['/v1/completions', { prompt: ['a', [1, 2, 3]], n: 2, logprobs: 1, stream: true }],
  ['/v1/completions', { prompt: [1, 2, 3], top_k: 5, min_p: 0.1, ignore_eos: true, max_tokens: 2 }],
  ['/tokenize', { prompt: 'hi', add_special_tokens: false }],
  ['/tokenize', { messages: MESSAGES, add_generation_prompt: false }],
  ['/detokenize', { tokens: [1, 2, 3] }],
]
const GETS = [
  '/',
  '/v1/models',
  '/v1/models/fake%2Fmodel',
  '/livez',
  '/readyz',
  '/health',
  '/metrics',
]

/** Values that have broken servers before. */
const VALUES: readonly unknown[] = [
  null,
  true,
  false,
  0,
  -1,
  1,
  0.5,
  1e308,
  -1e-308,
  2 ** 31,
  2 ** 53,
  -(2 ** 63),
  '',
  'x',
  '\u0000',
  '\ud800',
  '💥',
  '<|end|>',
  '<tool_call>',
  '{"a":',
  'x'.repeat(5000),
  [],
  {},
  [[]],
  [null],
  ['a', 1],
  { a: { b: { c: [] } } },
  { __proto__: null, constructor: 1, toString: 2 },
  Array(200).fill(7),
  Array.from({ length: 200 }, () => ({})),
]
const KEYS = [
  'n',
  'stop',
  'audio',
  'foo',
  '__proto__',
  'constructor',
  'content',
  'role',
  '',
  'tools',
]
const TYPES = [
  'application/json',
  'text/plain',
  'application/json; charset=utf-16',
  '',
  '*/*',
  'a/b;c',
]
const PATHS = [
  '/v1',
  '/v1/',
  '//',
  '/v1/models/%',
  '/v1/models/%ff',
  '/v1/chat',
  '/..',
  '/?a=%',
  '/%00',
]
const METHODS = ['GET', 'POST', 'PUT', 'DELETE', 'HEAD', 'OPTIONS', 'PATCH', 'FOO']

/** Changes one place of a JSON value in place of a random kind. */
function mutateJson(value: unknown, random: Random): unknown {
  const descend = typeof value === 'object' && value !== null && random.next() < 0.8
  if (!descend) return random.next() < 0.5 ? alike(value, random) : random.pick(VALUES)
  const copy = (Array.isArray(value) ? [...value] : { ...value }) as Record<string, unknown>
  const keys = Object.keys(copy)
  const key = random.pick(keys)
  const kind = random.below(10)
  if (keys.length === 0 || kind === 0) define(copy, random.pick(KEYS), random.pick(VALUES))
  else if (kind === 1) delete copy[key]
  else if (kind === 2) define(copy, random.pick(KEYS), copy[key])
  else define(copy, key, mutateJson(copy[key], random))
  return copy
}

/** Another value of the same type: often still valid, so that what lies behind is reached. */
function alike(value: unknown, random: Random): unknown {
  if (typeof value === 'number') return value + random.pick([1, -1, 0.25, 100])
  if (typeof value === 'string') return value + random.pick(['x', '\u{1f600}', '\ud800', ' '])
  if (typeof value === 'boolean') return !value
  return [value, value]
}

/** As JSON.parse does it: `__proto__` becomes a key like any other. */
function define(object: object, key: string, value: unknown): void {
  Object.defineProperty(object, key, {
    value,
    enumerable: true,
    configurable: true,
    writable: true,
  })
}

function mutateBytes(bytes: Buffer<ArrayBuffer>, random: Random): Buffer<ArrayBuffer> {
  const at = random.below(bytes.length + 1)
  const some = Buffer.from(Array.from({ length: 1 + random.below(4) }, () => random.below(256)))
  const kind = random.below(4)
  if (kind === 0) return bytes.subarray(0, at)
  if (kind === 1) return Buffer.concat([bytes.subarray(0, at), some, bytes.subarray(at)])
  if (kind === 2) return Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + some.length)])
  return Buffer.concat([bytes.subarray(0, at), some, bytes.subarray(at + some.length)])
}

function mutatedProbe(random: Random): Probe {
  const headers: Record<string, string> = { 'content-type': 'application/json' }
  const [path, json] = random.pick(POSTS)
  const probe: Probe = { method: 'POST', path, headers, body: undefined }
  let value: unknown = json
  const kind = random.below(20)
  const mutations = kind < 13 ? random.pick([1, 1, 1, 2, 3]) : 0
  for (let i = 0; i < mutations; i++) value = mutateJson(value, random)
  let body = Buffer.from(JSON.stringify(value) ?? '')
  if (kind >= 13 && kind < 17) body = mutateBytes(body, random)
  if (kind === 17) headers['content-type'] = random.pick(TYPES)
  if (kind === 17) headers['content-encoding'] = random.pick(['gzip', 'identity', 'x'])
  if (kind === 18) probe.method = random.pick(METHODS)
  if (kind === 19) probe.path = random.pick([...PATHS, ...GETS, `/${random.below(1e9)}`])
  if (kind === 19) probe.method = random.pick(['GET', 'POST'])
  if (probe.method !== 'GET' && probe.method !== 'HEAD') probe.body = body
  return probe
}

async function isIdle(engine: FakeEngine): Promise<boolean> {
  const { running, waiting, kv } = await engine.snapshot()
  return running + waiting + kv.usedPages === 0
}

test(
  `${IN_PROCESS} mutated requests are answered, none by a failure of ours`,
  { timeout: HANG_MS },
  async (t) => {
    t.diagnostic(`seed ${SEED}`)
    const random = new Random(SEED)
    const { app, engine } = fakeApp(ENGINE)
    const statuses = new Map<number, number>()
    let left = IN_PROCESS
    const worker = async (): Promise<void> => {
      while (left-- > 0) {
        const probe = mutatedProbe(random)
        const { method, path, headers, body } = probe
        const response = await app.request(path, {
          method,
          headers,
          ...(body ? { body: new Uint8Array(body) } : {}),
        })
        const { status } = response
        const text = await response.text()
        statuses.set(status, (statuses.get(status) ?? 0) + 1)
        const what = `${method} ${path} ${body?.toString() ?? ''} → ${status} ${text.slice(0, 300)}`
        assert.ok((status >= 200 && status < 300) || (status >= 400 && status < 500), what)
        if (status < 400 || method === 'HEAD') continue
        const { error } = JSON.parse(text)
        assert.ok(error.message.length > 0 && error.code.length > 0, what)
      }
    }
    await Promise.all(Array.from({ length: IN_FLIGHT }, worker))
    await until('an idle engine', () => isIdle(engine))
    t.diagnostic(JSON.stringify(Object.fromEntries([...statuses].toSorted(([a], [b]) => a - b))))
    // A mutation that only ever fails early would show nothing.
    assert.ok(statuses.get(200)! > IN_PROCESS / 10)
    assert.ok(statuses.get(400)! > IN_PROCESS / 10)
  },
)

/** A request as bytes on the wire, broken in its head, its length or its chunks. */
function mutatedWire(random: Random): Buffer {
  const probe = mutatedProbe(random)
  const body = probe.body ?? Buffer.alloc(0)
  const chunked = random.next() < 0.3
  const kind = random.below(6)
  const length = kind === 0 ? body.length + random.below(40) - 20 : body.length
  const framing = chunked ? 'Transfer-Encoding: chunked' : `Content-Length: ${length}`
  const head =
    `${probe.method} ${probe.path} HTTP/1.1\r\nHost: x\r\n${framing}\r\n` +
    `Content-Type: ${probe.headers['content-type']}\r\n\r\n`
  const payload = chunked ? chunks(body, random) : body
  const wire = Buffer.concat([Buffer.from(head), payload])
  if (kind === 1) return mutateBytes(wire, random)
  if (kind === 2) return mutateBytes(mutateBytes(wire, random), random)
  if (kind === 3) return Buffer.concat([mutateBytes(Buffer.from(head), random), payload])
  return kind === 4 ? Buffer.concat([wire, wire]) : wire
}

function chunks(body: Buffer, random: Random): Buffer {
  const parts: Buffer[] = []
  for (let at = 0; at < body.length;) {
    const size = 1 + random.below(body.length)
    const part = body.subarray(at, at + size)
    const said = random.next() < 0.1 ? part.length + random.below(9) : part.length
    parts.push(Buffer.from(`${said.toString(16)}\r\n`), part, Buffer.from('\r\n'))
    at += size
  }
  return Buffer.concat([...parts, Buffer.from('0\r\n\r\n')])
}

/** What came back until the connection ended; a client that waits in vain leaves after a while. */
function exchange(url: string, wire: Buffer): Promise<string> {
  const { hostname, port } = new URL(url)
  return new Promise((resolve, reject) => {
    let received = ''
    const socket = connect(Number(port), hostname, () => socket.write(wire))
    const leave = setTimeout(() => socket.end(), 25)
    const hang = setTimeout(() => {
      reject(new Error(`hangs: ${wire.toString('latin1')}`))
      socket.destroy()
    }, 5000)
    socket.on('data', (chunk) => (received += chunk.toString('latin1')))
    socket.on('error', () => {})
    socket.on('close', () => {
      clearTimeout(leave)
      clearTimeout(hang)
      resolve(received)
    })
  })
}

test(
  `${ON_SOCKETS} broken requests on sockets leave the server well`,
  { timeout: HANG_MS },
  async (t) => {
    t.diagnostic(`seed ${SEED}`)
    const random = new Random(SEED + 1)
    await using server = await fakeServer(ENGINE)
    let answered = 0
    let left = ON_SOCKETS
    const worker = async (): Promise<void> => {
      while (left-- > 0) {
        const wire = mutatedWire(random)
        const received = await exchange(server.url, wire)
        const statuses = [...received.matchAll(/^HTTP\/1\.1 (\d)\d\d /gm)].map((match) => match[1]!)
        if (statuses.length > 0) answered++
        const what = `${wire.toString('latin1')} → ${received.slice(0, 500)}`
        assert.ok(
          statuses.every((status) => status === '2' || status === '4'),
          what,
        )
      }
    }
    await Promise.all(Array.from({ length: IN_FLIGHT }, worker))
    assert.ok(answered > ON_SOCKETS / 2, `only ${answered} were answered`)
    await until('an idle engine', () => isIdle(server.engine))
    assert.equal((await fetch(`${server.url}/livez`)).status, 200)
  },
)
