// Catches frames that are read otherwise than they were written, peers that make no sense and are
// believed, and an engine that does not read and is sent more.

import assert from 'node:assert/strict'
import { once } from 'node:events'
import { statSync, writeFileSync } from 'node:fs'
import { connect, createServer, type Socket } from 'node:net'
import { join } from 'node:path'
import { setImmediate as turn } from 'node:timers/promises'
import { test, type TestContext } from 'node:test'
import { LatticeError } from '../errors.ts'
import { FakeEngine } from '../../test/support/fake-engine.ts'
import { fakeTokenizer } from '../../test/support/fake-tokenizer.ts'
import { Random } from '../../test/support/random.ts'
import { temporaryDirectory } from '../../test/support/temporary.ts'
import type { DatagramReplica } from './datagram-server.ts'
import type { WireRequest } from './exchange.ts'
import {
  frameHeader,
  FRAME_BYTES_MAX,
  FrameReader,
  type JoinFrame,
  type JoinType,
  readStart,
  readWelcome,
  writeJoin,
  writeStart,
  writeWelcome,
} from './join-frames.ts'
import { JoinHub, type JoinPlace } from './join-hub.ts'
import { JoinedReplica } from './joined-replica.ts'

const KEY = Uint8Array.from({ length: 16 }, (_, i) => i)
const LIMITS = { tokensPerSecond: 1e6, burstTokens: 1e9, maxRunning: 100 }
const TENANTS = [{ index: 5, name: 'five', keys: [KEY, KEY] as const, ...LIMITS }]
const REQUEST: WireRequest = {
  tenant: 5,
  request: 0xfedcba9876543210n,
  route: 1,
  prompt: Buffer.from('Why?'),
  chat: false,
  raw: true,
  maxTokens: 100,
  sampling: { temperature: 0.5, topP: 0.25, seed: 0xffffffffffffffffn },
}

/** What the hub asks of the datagram server. */
class Place implements JoinPlace {
  readonly replicas: (DatagramReplica | undefined)[] = []
  readonly held = new Set<string>()
  ready: boolean[] = []
  news: () => void = () => {}

  addReplica(replica: DatagramReplica): number {
    const index = this.replicas.push(replica) - 1
    this.ready[index] = true
    this.news()
    return index
  }
  removeReplica(index: number): void {
    this.replicas[index] = undefined
    this.news()
  }
  setReady(index: number, isReady: boolean): void {
    this.ready[index] = isReady
    this.news()
  }
  setOtherLoad(): void {}
  publish(index: number, hash: bigint, isHeld: boolean): void {
    if (isHeld) this.held.add(`${index} ${hash}`)
    else this.held.delete(`${index} ${hash}`)
  }

  async until(holds: () => boolean): Promise<void> {
    while (!holds()) await new Promise<void>((resolve) => (this.news = resolve))
  }
}

interface Hub {
  place: Place
  path: string
  warnings: string[]
}

async function hub(t: TestContext, silenceMs?: number): Promise<Hub> {
  const [place, warnings] = [new Place(), [] as string[]]
  const path = join(temporaryDirectory('hub'), 'socket')
  const warn = (line: string): void => void warnings.push(line)
  const silence = silenceMs === undefined ? {} : { silenceMs }
  const listening = await JoinHub.listen(place, { path, tenants: TENANTS, warn, ...silence })
  t.after(() => listening.close())
  return { place, path, warnings }
}

/** Whoever joins by hand: what it is told, as frames. */
function peer(t: TestContext, path: string): { socket: Socket; told: JoinFrame[] } {
  const socket = connect(path)
  t.after(() => void socket.destroy())
  const reader = new FrameReader()
  const told: JoinFrame[] = []
  socket.on('data', (chunk: Buffer) => {
    reader.read(chunk, (one) => void told.push(one))
  })
  socket.on('error', () => {})
  return { socket, told }
}

function frame(type: JoinType, payload: Uint8Array, id = 0): Uint8Array {
  return Buffer.concat([frameHeader(type, id, 0, payload.length), payload])
}

const JOIN = writeJoin({ model: 'm', process: 7 })

test('a frame is read otherwise, however the bytes come', () => {
  const seed = Math.floor(Math.random() * 2 ** 31)
  const random = new Random(seed)
  const payloads = [0, 1, 11, 12, 13, 5000, 0, 70_000].map((length) =>
    Uint8Array.from({ length }, () => random.below(256)),
  )
  const bytes = Buffer.concat(payloads.map((payload, i) => frame('tokens', payload, i)))
  for (const most of [1, 7, 13, 4096, bytes.length]) {
    const reader = new FrameReader()
    const read: Uint8Array[] = []
    for (let at = 0; at < bytes.length;) {
      const end = at + 1 + random.below(most)
      const isGood = reader.read(bytes.subarray(at, end), ({ id, payload }) => {
        assert.equal(id, read.length, `seed ${seed}`)
        read.push(Uint8Array.from(payload))
      })
      assert.ok(isGood)
      at = end
    }
    assert.deepEqual(read, payloads, `seed ${seed}, up to ${most} bytes at a time`)
  }
})

test('what is no frame is believed', () => {
  const take = (): void => assert.fail('it is no frame')
  const type = frameHeader('load', 0, 0, 0)
  type[4] = 99
  assert.equal(new FrameReader().read(type, take), false)
  const long = frameHeader('start', 0, 0, FRAME_BYTES_MAX + 1)
  assert.equal(new FrameReader().read(long, take), false)
})

test('a request or a tenant changes on its way', () => {
  const { route: _, ...expected } = REQUEST
  const read = readStart(Buffer.concat([writeStart(REQUEST), REQUEST.prompt]))
  assert.deepEqual(read, expected)
  assert.equal(readStart(writeStart(REQUEST)), undefined, 'there is no prompt')
  const tenants = [
    { index: 5, name: 'five', key: KEY },
    { index: 1023, name: 'é', key: KEY.toReversed() },
  ]
  assert.deepEqual(readWelcome(writeWelcome(tenants)), tenants)
  assert.equal(readWelcome(writeWelcome(tenants).subarray(0, -1)), undefined)
})

test('an engine of another version joins, or what is no engine', async (t) => {
  const { place, path, warnings } = await hub(t)
  const other = peer(t, path)
  const version = Uint8Array.from(JOIN)
  version[5] = 9
  other.socket.write(frame('join', version))
  await once(other.socket, 'close')
  assert.equal(other.told[0]?.type, 'refused')
  assert.match(String(Buffer.from(other.told[0].payload)), /version 9.*version 1 is spoken/)
  const garbage = [
    Buffer.from('GET / HTTP/1.1\r\n\r\n'),
    frame('tokens', Uint8Array.of(0, 0)),
    frame('join', Uint8Array.of(1)),
    frame(
      'join',
      JOIN.map((byte) => byte ^ 255),
    ),
  ]
  for (const bytes of garbage) {
    const { socket } = peer(t, path)
    socket.write(bytes)
    await once(socket, 'close')
  }
  assert.deepEqual(place.replicas, [])
  // One that has joined, and then makes no sense.
  const turned = peer(t, path)
  turned.socket.write(frame('join', JOIN))
  await place.until(() => place.replicas.length === 1)
  turned.socket.write(frame('end', Uint8Array.of(1, 2)))
  await once(turned.socket, 'close')
  await place.until(() => place.replicas[0] === undefined)
  assert.match(warnings.join(), /process 7 is gone .* makes no sense/)
})

test('an engine that does not read is sent more and more', async (t) => {
  const { place, path } = await hub(t)
  const slow = peer(t, path)
  slow.socket.write(frame('join', JOIN))
  await place.until(() => place.replicas.length === 1)
  slow.socket.pause()
  const prompt = new Uint8Array(1 << 20)
  const ends: string[] = []
  const ask = (): void => {
    const answer = { tokens() {}, end: (code: string) => void ends.push(code) }
    place.replicas[0]?.start({ ...REQUEST, prompt }, 'five', answer)
  }
  let sent = 0
  for (; place.ready[0]; sent++) {
    ask()
    await turn()
    assert.ok(sent < 100, 'it is never full')
  }
  assert.deepEqual(ends, [])
  ask()
  assert.deepEqual(ends, ['busy'])
  slow.socket.resume()
  await place.until(() => place.ready[0] === true)
  assert.ok(slow.told.length > 1 && sent > 15, `${slow.told.length} of ${sent}`)
})

test('two owners share a socket, others may use it, or a dead one keeps it', async (t) => {
  const { place, path } = await hub(t)
  assert.equal(statSync(path).mode & 0o777, 0o600)
  const options = { path, tenants: TENANTS, warn() {} }
  await assert.rejects(JoinHub.listen(place, options), /Another process listens/)
  const file = join(temporaryDirectory('hub'), 'file')
  writeFileSync(file, '')
  await assert.rejects(JoinHub.listen(place, { ...options, path: file }), /something else/)
  const nowhere = join(temporaryDirectory('hub'), 'no', 'socket')
  await assert.rejects(JoinHub.listen(place, { ...options, path: nowhere }), /No socket can be/)
})

test('an engine that cannot join says nothing of why', async (t) => {
  const path = join(temporaryDirectory('hub'), 'socket')
  const engine = new FakeEngine()
  const parts = { engine, tokenizer: fakeTokenizer(), template: undefined, publishes: false }
  const options = { ...parts, path, load: () => 0, warn() {} }
  await assert.rejects(JoinedReplica.join(options), { code: 'net_refused', message: /ENOENT/ })
  const server = createServer((socket) => socket.end(frame('refused', Buffer.from('no room'))))
  await new Promise<void>((resolve) => server.listen(path, resolve))
  t.after(() => void server.close())
  await assert.rejects(JoinedReplica.join(options), { code: 'net_refused', message: 'no room' })
})

test('an engine that leaves is given requests, or loses those that it has', async (t) => {
  const { place, path, warnings } = await hub(t)
  const engine = new FakeEngine({ stepMs: 1, reply: () => 'some words' })
  const parts = { engine, tokenizer: fakeTokenizer(), template: undefined, publishes: false }
  const joined = await JoinedReplica.join({ ...parts, path, load: () => 0, warn() {} })
  const said: string[] = []
  const ended = new Promise<string>((end) => {
    const tokens = (_ids: readonly number[], text: string): void => void said.push(text)
    place.replicas[0]?.start(REQUEST, 'five', { tokens, end })
  })
  joined.refuse()
  await place.until(() => place.ready[0] === false)
  const late = new Promise<string>((end) => {
    place.replicas[0]?.start(REQUEST, 'five', { tokens() {}, end })
  })
  assert.equal(await late, 'no_replica')
  assert.equal(await ended, 'ok')
  assert.equal(said.join(''), 'some words')
  await joined.close()
  await place.until(() => place.replicas[0] === undefined)
  assert.deepEqual(warnings, [])
  assert.equal(engine.requests[0]?.tenant, 'five')
})

test('an engine that hangs is taken for one that is there', async (t) => {
  const { place, path, warnings } = await hub(t, 100)
  peer(t, path).socket.write(frame('join', JOIN))
  await place.until(() => place.replicas.length === 1)
  await place.until(() => place.replicas[0] === undefined)
  assert.match(warnings.join(), /process 7 is gone .* said nothing for/)
})

test('an engine that has stopped goes on being asked', async (t) => {
  const { place, path } = await hub(t)
  const engine = new FakeEngine()
  const parts = { engine, tokenizer: fakeTokenizer(), template: undefined, publishes: false }
  const joined = await JoinedReplica.join({ ...parts, path, load: () => 0, warn() {} })
  t.after(() => joined.close())
  engine.submitChoices = () => {
    throw new LatticeError('engine_stopped', 'The engine has stopped.')
  }
  const ended = new Promise<string>((end) => {
    place.replicas[0]?.start(REQUEST, 'five', { tokens() {}, end })
  })
  assert.equal(await ended, 'no_replica')
  await place.until(() => place.ready[0] === false)
})

test('noise from an engine brings the owner down, or its replica stays', async (t) => {
  const { place, path } = await hub(t)
  const seed = Math.floor(Math.random() * 2 ** 31)
  t.diagnostic(`seed ${seed}`)
  const random = new Random(seed)
  const types = ['tokens', 'end', 'held', 'gone', 'load', 'leave', 'start', 'welcome'] as const
  for (let round = 0; round < 200; round++) {
    const { socket } = peer(t, path)
    const closed = once(socket, 'close')
    socket.write(frame('join', JOIN))
    for (let i = 0; i < 20; i++) {
      const payload = Uint8Array.from({ length: random.below(40) }, () => random.below(256))
      const bytes = frame(types[random.below(types.length)]!, payload, random.below(3))
      if (random.below(4) === 0) bytes[random.below(bytes.length)] = random.below(256)
      socket.write(bytes)
    }
    socket.end()
    await closed
  }
  await place.until(() => place.replicas.every((replica) => replica === undefined))
})
