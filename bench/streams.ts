// Owns what streaming answers costs the server's main thread, without what a model costs: a server
// with a real tokenizer and an engine that computes nothing, in a process of its own; clients here.
//   node bench/streams.ts [--model MODEL] [--streams 256] [--step-ms 10] [--tokens 400] [--json]

import { fork } from 'node:child_process'
import { once } from 'node:events'
import { readdirSync, readFileSync } from 'node:fs'
import { connect } from 'node:net'
import { parseArgs } from 'node:util'
import { EngineClient } from '../src/engine/client.ts'
import { EVICTION_DEFAULT } from '../src/kv/eviction.ts'
import { openModel } from '../src/model/load.ts'
import { resolveModel } from '../src/model/registry.ts'
import { startServer } from '../src/server/server.ts'
import { loadTokenizer } from '../src/text/load.ts'

const { values } = parseArgs({
  options: {
    model: { type: 'string' },
    streams: { type: 'string', default: '256' },
    'step-ms': { type: 'string', default: '10' },
    tokens: { type: 'string', default: '400' },
    json: { type: 'boolean', default: false },
  },
})
const streams = Number(values.streams)
const stepMs = Number(values['step-ms'])
const tokens = Number(values.tokens)

/** Tokens that the engine chooses from: a row of logits is a hash of each, which takes time. */
const VOCAB = 2000
const CONTEXT = 2048
/** Of /proc's clock. */
const TICK_MS = 10

interface Times {
  mainMs: number
  engineMs: number
}

/** CPU so far of the main thread, and of the engine's. */
function cpuTimes(): Times {
  const times = { mainMs: 0, engineMs: 0 }
  for (const thread of readdirSync('/proc/self/task')) {
    const stat = readFileSync(`/proc/self/task/${thread}/stat`, 'utf8')
    const name = stat.slice(stat.indexOf('(') + 1, stat.lastIndexOf(')'))
    const numbers = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
    const ms = (Number(numbers[11]) + Number(numbers[12])) * TICK_MS
    if (Number(thread) === process.pid) times.mainMs += ms
    else if (name === 'WorkerThread') times.engineMs += ms
  }
  return times
}

async function serve(tell: (message: unknown) => void): Promise<void> {
  const { path } = await resolveModel(values.model)
  const tokenizer = loadTokenizer(openModel(path))
  const kv = { layers: 2, rowBytes: 256, pageBytes: 1 << 16 }
  const engine = await EngineClient.start(
    {
      backend: { kind: 'null', vocab: VOCAB, stepMs, ahead: true, kv },
      ...{ contextLength: CONTEXT, maxSequences: streams, stepTokens: 2 * streams + 64 },
      ...{ kvBytes: 2 ** 32, prefixCacheBytes: 0, prefixEviction: EVICTION_DEFAULT },
      prefixCacheOutput: false,
    },
    { id: 'null', architecture: 'llama', contextLength: CONTEXT, vocabSize: VOCAB },
    { sequences: 2 * streams, contextLength: CONTEXT },
  )
  const on = { host: '127.0.0.1', port: 0 }
  const server = await startServer({ engine, tokenizer, template: undefined, ...on })
  process.on('message', () => tell(cpuTimes()))
  process.on('disconnect', () => process.exit(0))
  tell(server.url)
}

/** One answer, read to its end. @returns events that carried text */
function answer(port: number, seed: number): Promise<number> {
  const body = JSON.stringify({
    ...{ model: 'null', prompt: [5, 6, 7, 8 + (seed % 1000)], max_tokens: tokens },
    ...{ ignore_eos: true, stream: true, temperature: 0 },
  })
  return new Promise((resolve, reject) => {
    const socket = connect(port, '127.0.0.1')
    let events = 0
    let end = ''
    socket.write(
      `POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n` +
        `Content-Length: ${body.length}\r\n\r\n${body}`,
    )
    socket.on('data', (bytes) => {
      const text = bytes.toString('latin1')
      events += text.split('data: ').length - 1
      end = (end + text).slice(-100)
      if (!end.includes('[DONE]')) return
      socket.destroy()
      // The finish and the end are no text.
      resolve(events - 2)
    })
    socket.on('error', reject)
    socket.on('end', () => reject(new Error(`a stream ended early: ${end}`)))
  })
}

async function measure(): Promise<void> {
  const server = fork(import.meta.filename, process.argv.slice(2))
  // It has said why: nobody is to wait for its answers.
  server.once('exit', (code) => process.exit(code ?? 1))
  const [url] = (await once(server, 'message')) as [string]
  const port = Number(new URL(url).port)
  const ask = async (): Promise<Times> => {
    server.send('times')
    return ((await once(server, 'message')) as [Times])[0]
  }
  const round = () => Promise.all(Array.from({ length: streams }, (_, i) => answer(port, i)))
  await round()
  const before = await ask()
  const start = performance.now()
  const events = (await round()).reduce((sum, count) => sum + count, 0)
  const ms = performance.now() - start
  const after = await ask()
  server.removeAllListeners('exit').disconnect()
  const all = streams * tokens
  const mainMs = after.mainMs - before.mainMs
  const result = {
    streams,
    tokens_per_second: Math.round((all / ms) * 1e3),
    events_per_token: events / all,
    main_thread_us_per_token: (mainMs / all) * 1e3,
    main_thread_share: mainMs / ms,
    engine_thread_us_per_token: ((after.engineMs - before.engineMs) / all) * 1e3,
  }
  if (values.json) return void process.stdout.write(`${JSON.stringify(result)}\n`)
  for (const [name, value] of Object.entries(result)) {
    process.stdout.write(`${name.padEnd(28)} ${Number(value.toPrecision(4))}\n`)
  }
}

const tell = process.send?.bind(process)
await (tell ? serve((message) => void tell(message)) : measure())
