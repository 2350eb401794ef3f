// Owns the soak of streams: many clients at once, a fifth of which leave at random. It checks that
// no other client sees an error, that no sequence or page is left, and that memory stays flat.
//   node test/soak/streams.ts [--url URL] [--api-key KEY] [--clients 200] [--seconds 60] [--seed 1]
// Without --url it serves a fake engine from a process of its own.

import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { parseArgs } from 'node:util'
import type { EngineSnapshot } from '../../src/engine/api.ts'
import { Random } from '../support/random.ts'

export interface SoakOptions {
  url: string
  apiKey?: string | undefined
  clients: number
  seconds: number
  seed: number
}

export interface SoakReport {
  finished: number
  left: number
  tokens: number
  /** What went wrong, the first few of each run; empty is a pass. */
  errors: string[]
  /** The most memory of the server, but for KV, in the first half of the time, and the second. */
  residentBytesEarly: number
  residentBytesLate: number
}

const LEAVE_SHARE = 0.2
const MAX_TOKENS = 80
/** Memory may breathe, by garbage between collections; a leak of streams grows past this. */
const GROWTH_BYTES_MAX = 32 << 20
const IDLE_WITHIN_MS = 1000

export async function soak(options: SoakOptions): Promise<SoakReport> {
  const report: SoakReport = {
    finished: 0,
    left: 0,
    tokens: 0,
    errors: [],
    residentBytesEarly: 0,
    residentBytesLate: 0,
  }
  const startMs = performance.now()
  const endMs = startMs + options.seconds * 1000
  const random = new Random(options.seed)
  const clients = Array.from({ length: options.clients }, async () => {
    while (performance.now() < endMs) await stream(options, random, report)
  })
  const watching = watchMemory(options, report, startMs, endMs)
  await Promise.all([...clients, watching])
  await checkIdle(options, report)
  const grown = report.residentBytesLate - report.residentBytesEarly
  if (grown > GROWTH_BYTES_MAX) note(report, `memory grew by ${Math.round(grown / 2 ** 20)} MiB`)
  return report
}

/** One request, read to its end or left on the way. */
async function stream(options: SoakOptions, random: Random, report: SoakReport): Promise<void> {
  const leaving = new AbortController()
  const leaveAfter = random.next() < LEAVE_SHARE ? random.below(40) : Infinity
  // Some leave before the first token, while they still wait in the queue.
  const timer = leaveAfter < 5 ? setTimeout(() => leaving.abort(), random.below(50)) : undefined
  try {
    const response = await request(options, random, leaving.signal)
    if (response.status !== 200) {
      note(report, `status ${response.status}: ${await response.text()}`)
      return
    }
    let text = ''
    let chunks = 0
    const decoder = new TextDecoder()
    for await (const bytes of response.body!) {
      text += decoder.decode(bytes, { stream: true })
      if (++chunks > leaveAfter) leaving.abort()
    }
    report.tokens += checkFrames(text, report)
    report.finished++
  } catch (error) {
    if (leaving.signal.aborted) report.left++
    else note(report, String(error))
  } finally {
    clearTimeout(timer)
  }
}

function request(options: SoakOptions, random: Random, signal: AbortSignal): Promise<Response> {
  const body = {
    messages: [{ role: 'user', content: 'x'.repeat(1 + random.below(200)) }],
    max_tokens: 1 + random.below(MAX_TOKENS),
    ignore_eos: true,
    stream: true,
  }
  return fetch(`${options.url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', ...authorization(options) },
    body: JSON.stringify(body),
    signal,
  })
}

/** How many frames had text. A stream that is whole ends with [DONE] and has no error in it. */
function checkFrames(text: string, report: SoakReport): number {
  if (!text.endsWith('data: [DONE]\n\n')) note(report, `cut stream: …${text.slice(-200)}`)
  // With its colon: a model may well say the word.
  if (text.includes('"error":')) note(report, `error in a stream: ${text.slice(-300)}`)
  return text.split('"content":').length - 1
}

async function watchMemory(
  options: SoakOptions,
  report: SoakReport,
  startMs: number,
  endMs: number,
): Promise<void> {
  const halfMs = (startMs + endMs) / 2
  while (performance.now() < endMs) {
    await new Promise((resolve) => setTimeout(resolve, 250))
    const resident = await residentBytes(options)
    const half = performance.now() < halfMs ? 'residentBytesEarly' : 'residentBytesLate'
    report[half] = Math.max(report[half], resident)
  }
}

async function residentBytes(options: SoakOptions): Promise<number> {
  const text = await (await fetch(`${options.url}/metrics`)).text()
  const gauge = (name: string): number =>
    Number(new RegExp(`^lattice_${name} (\\d+)$`, 'm').exec(text)?.[1])
  return gauge('process_resident_memory_bytes') - gauge('kv_resident_bytes')
}

async function checkIdle(options: SoakOptions, report: SoakReport): Promise<void> {
  const deadline = performance.now() + IDLE_WITHIN_MS
  let last = ''
  while (performance.now() < deadline) {
    const headers = authorization(options)
    const response = await fetch(`${options.url}/debug/sequences`, { headers })
    const { running, waiting, kv } = (await response.json()) as EngineSnapshot
    if (running + waiting + kv.usedPages === 0) return
    last = `${running} running, ${waiting} waiting, ${kv.usedPages} pages`
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
  note(report, `left behind after ${IDLE_WITHIN_MS} ms: ${last}`)
}

function authorization(options: SoakOptions): Record<string, string> {
  return options.apiKey ? { authorization: `Bearer ${options.apiKey}` } : {}
}

function note(report: SoakReport, error: string): void {
  if (report.errors.length < 10) report.errors.push(error)
}

/** A fake engine served by a process of its own, so that its memory is the server's alone. */
export async function serveFake(): Promise<{ url: string; process: ChildProcess }> {
  // A small heap is collected often, so that it shows within seconds what stays.
  const heap = ['--max-semi-space-size=2', '--max-old-space-size=96']
  const child = spawn(process.execPath, [...heap, import.meta.filename, '--serve-fake'], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const [line] = (await once(child.stdout, 'data')) as [Buffer]
  return { url: line.toString().trim(), process: child }
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      url: { type: 'string' },
      'api-key': { type: 'string' },
      clients: { type: 'string', default: '200' },
      seconds: { type: 'string', default: '60' },
      seed: { type: 'string', default: '1' },
      'serve-fake': { type: 'boolean', default: false },
    },
  })
  if (values['serve-fake']) {
    const { fakeServer } = await import('../support/fake-server.ts')
    const { url } = await fakeServer({ stepMs: 10, reply: () => 'word '.repeat(20) })
    process.stdout.write(`${url}\n`)
    return
  }
  const fake = values.url === undefined ? await serveFake() : undefined
  const report = await soak({
    url: values.url ?? fake!.url,
    apiKey: values['api-key'],
    clients: Number(values.clients),
    seconds: Number(values.seconds),
    seed: Number(values.seed),
  })
  fake?.process.kill()
  process.stdout.write(`${JSON.stringify(report, null, 2)}\n`)
  process.exitCode = report.errors.length === 0 ? 0 : 1
}

if (import.meta.main) await main()
