// Catches connections that go to a server with more to do, or to one that is gone.

import assert from 'node:assert/strict'
import { type ChildProcessByStdio, spawn } from 'node:child_process'
import { once } from 'node:events'
import { get } from 'node:http'
import { createInterface } from 'node:readline'
import type { Readable, Writable } from 'node:stream'
import { text } from 'node:stream/consumers'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { mapsByName } from '../../src/ffi/bpf-objects.ts'
import { closeFd } from '../../src/ffi/libc.ts'

const skip = process.getuid?.() === 0 ? false : 'SKIPPED: loading BPF programs needs root'
const HOST = fileURLToPath(new URL('steer-host.ts', import.meta.url))

interface Listener {
  process: ChildProcessByStdio<Writable, Readable, null>
  port: number
  /** Sends a line and waits for its answer. */
  say(line: string): Promise<void>
}

async function listener(number: number, port: number): Promise<Listener> {
  const child = spawn(process.execPath, [HOST, `${number}`, `${port}`], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]()
  const first = await lines.next()
  return {
    process: child,
    port: Number(first.value),
    async say(line) {
      child.stdin.write(`${line}\n`)
      await lines.next()
    },
  }
}

/** Who answers a new connection. */
async function ask(port: number): Promise<number> {
  const [response] = await once(get({ port, host: '127.0.0.1', agent: false }), 'response')
  return Number(await text(response as Readable))
}

async function answers(port: number, times: number): Promise<number[]> {
  const counts = [0, 0, 0]
  for (let i = 0; i < times; i++) counts[await ask(port)]! += 1
  return counts
}

test('a connection goes to a server with more to do, or that is gone', { skip }, async (t) => {
  const listeners: Listener[] = []
  t.after(() => listeners.forEach(({ process: child }) => child.kill('SIGKILL')))
  for (const number of [0, 1, 2]) listeners.push(await listener(number, listeners[0]?.port ?? 0))
  const [first, second, third] = listeners as [Listener, Listener, Listener]
  const { port } = first
  // Each connection counts until its server says how much it really has.
  assert.deepEqual(await answers(port, 30), [10, 10, 10])
  await Promise.all([first.say('load 100'), second.say('load 5'), third.say('load 90')])
  assert.deepEqual(await answers(port, 20), [0, 20, 0])
  await second.say('leave')
  assert.deepEqual(await answers(port, 20), [5, 0, 15])
  third.process.kill('SIGKILL')
  await once(third.process, 'exit')
  assert.deepEqual(await answers(port, 10), [10, 0, 0])
  listeners.push(await listener(1, port))
  assert.equal(await ask(port), 1, 'a server that joins in a place that was taken gets nothing')
})

test('what steers stays when its servers are killed', { skip }, async (t) => {
  const before = new Set(mapIds())
  const { process: child } = await listener(0, 0)
  t.after(() => child.kill('SIGKILL'))
  const made = mapIds().filter((id) => !before.has(id))
  assert.ok(made.length > 0)
  child.kill('SIGKILL')
  await once(child, 'exit')
  // The kernel frees a map a moment after its last user.
  for (let tries = 0; mapIds().some((id) => made.includes(id)); tries++) {
    assert.ok(tries < 1000, 'the map is still there after 10 s')
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
})

function mapIds(): number[] {
  return mapsByName('steer_loads').map(({ id, fd }) => {
    closeFd(fd)
    return id
  })
}
