// Catches servers that share a port and get connections otherwise than by what they have to do, or
// a killed one that still gets some.

import assert from 'node:assert/strict'
import { once } from 'node:events'
import { copyFileSync } from 'node:fs'
import { get } from 'node:http'
import { connect, type Socket } from 'node:net'
import { join } from 'node:path'
import type { Readable } from 'node:stream'
import { json } from 'node:stream/consumers'
import { test } from 'node:test'
import { ServeProcess } from '../support/serve-process.ts'
import { temporaryDirectory } from '../support/temporary.ts'
import { tinyLlama, writeTinyGguf } from '../support/tiny-gguf.ts'
import { WITHOUT_ROOT } from './namespaces.ts'

const skip = WITHOUT_ROOT
/** Requests that each server has at least: far more than one that is just being answered. */
const HELD = 5

interface Held {
  /** Which server has it. */
  by: string
  socket: Socket
}

/** Who answers a new connection, by the name of its model. */
async function ask(port: number): Promise<string> {
  const [response] = await once(get({ port, path: '/v1/models', agent: false }), 'response')
  return nameIn(await json(response as Readable))
}

function nameIn(models: unknown): string {
  return (models as { data: { id: string }[] }).data[0]!.id
}

/** A request that stays: the server waits for its body. */
async function hold(port: number): Promise<Held> {
  const socket = connect(port, '127.0.0.1')
  socket.on('error', () => {})
  socket.write('GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n')
  let text = ''
  while (!text.includes('\r\n\r\n{') || !text.trimEnd().endsWith('}')) {
    const [chunk] = (await once(socket, 'data')) as [Buffer]
    text += String(chunk)
  }
  const by = nameIn(JSON.parse(text.slice(text.indexOf('\r\n\r\n{'))))
  socket.write(
    'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n' +
      'Content-Length: 1000\r\n\r\n',
  )
  return { by, socket }
}

/** Asks until so many in a row have one answer: what a server has is known when it has heard. */
async function untilAll(port: number, by: string, times: number): Promise<void> {
  for (let [row, asked] = [0, 0]; row < times; asked++) {
    assert.ok(asked < 2000, `${by} does not get ${times} connections in a row`)
    row = (await ask(port)) === by ? row + 1 : 0
  }
}

test('a connection goes to the busier server, or to a dead one', { skip }, async (t) => {
  const folder = temporaryDirectory('share')
  const tiny = writeTinyGguf(tinyLlama())
  const serve = async (name: string, port: number): Promise<ServeProcess> => {
    const model = join(folder, `${name}.gguf`)
    copyFileSync(tiny, model)
    const flags = ['--model', model, '--threads', '1', '--share-port', '--port', `${port}`]
    const server = new ServeProcess(flags, {})
    t.after(() => server.kill())
    await server.ready()
    return server
  }
  const first = await serve('first', 0)
  const port = Number(new URL(first.url).port)
  const second = await serve('second', port)
  const all: Held[] = []
  t.after(() => all.forEach(({ socket }) => socket.destroy()))
  const heldBy = (name: string) => all.filter(({ by }) => by === name)
  while (heldBy('first').length < HELD || heldBy('second').length < HELD) {
    assert.ok(all.length < 10 * HELD, 'one of them gets nothing')
    all.push(await hold(port))
  }
  for (const { socket } of heldBy('first')) socket.destroy()
  await untilAll(port, 'first', 20)
  all.push(...(await Promise.all(Array.from({ length: 2 * HELD }, () => hold(port)))))
  for (const { socket } of heldBy('second')) socket.destroy()
  await untilAll(port, 'second', 20)
  await second.kill()
  for (let i = 0; i < 30; i++) assert.equal(await ask(port), 'first')
  const again = await serve('again', port)
  await untilAll(port, 'again', 20)
  await again.stop()
  for (let i = 0; i < 10; i++) assert.equal(await ask(port), 'first')
})
