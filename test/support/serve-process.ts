// Owns a `lattice serve` of a test as a process that can be killed, and completions asked of it
// whose every token is compared.

import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'

const LATTICE = fileURLToPath(new URL('../../bin/lattice', import.meta.url))
const END_MS_MAX = 20_000

/** A greedy answer: text and log probability of each token. */
export type AnswerTokens = [text: string, logprob: number][]

export interface Expected {
  tokens: number[]
  answer: AnswerTokens
}

export interface SessionJson {
  id: string
  where: 'memory' | 'disk' | 'both'
  durable: boolean
}

export class ServeProcess {
  /** What it said so far, on both streams. */
  output = ''
  private readonly child: ChildProcess
  private readonly closed: Promise<string>
  private hear: () => void = () => {}

  constructor(flags: readonly string[], env: NodeJS.ProcessEnv) {
    // A group of its own, so that whatever it leaves behind can be seen.
    this.child = spawn(LATTICE, ['serve', '--port', '0', ...flags], {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, LATTICE_API_KEY: undefined, LATTICE_LOG: undefined, ...env },
      detached: true,
    })
    for (const stream of [this.child.stdout, this.child.stderr]) {
      stream?.setEncoding('utf8').on('data', (text: string) => {
        this.output += text
        this.hear()
      })
    }
    this.closed = new Promise((resolve) => {
      this.child.once('close', (code, signal) => resolve(String(signal ?? code)))
    })
  }

  get url(): string {
    const url = /^Serving .* on (http:\S+),/m.exec(this.output)?.[1]
    assert.ok(url, `it is not ready:\n${this.output}`)
    return url
  }

  get pid(): number {
    return this.child.pid!
  }

  async ready(): Promise<void> {
    const said = new Promise<void>((resolve) => {
      this.hear = () => {
        if (/^Serving .*\n/m.test(this.output)) resolve()
      }
    })
    const ended = this.closed.then((how) => {
      throw new Error(`it ended with ${how} instead of starting:\n${this.output}`)
    })
    await Promise.race([said, ended])
    ended.catch(() => {})
  }

  /** Kills it, unless it was: anything else that ended it is an error. */
  async kill(): Promise<void> {
    this.child.kill('SIGKILL')
    const how = await this.closed
    if (how !== 'SIGKILL' && how !== '0') {
      throw new Error(`it had ended with ${how} before it was killed:\n${this.output}`)
    }
    this.assertAlone()
  }

  /** Asks it to end, and waits until it has. */
  async stop(): Promise<void> {
    this.child.kill('SIGTERM')
    const late = sleep(END_MS_MAX, 'not at all', { ref: false })
    const how = await Promise.race([this.closed, late])
    assert.equal(how, '0', `it ended with ${how}:\n${this.output}`)
    this.assertAlone()
  }

  async metric(name: string): Promise<number> {
    const text = await (await fetch(`${this.url}/metrics`)).text()
    const value = new RegExp(`^${name} (\\S+)$`, 'm').exec(text)?.[1]
    assert.ok(value, `there is no ${name}`)
    return Number(value)
  }

  async sessions(): Promise<SessionJson[]> {
    const response = await fetch(`${this.url}/v1/sessions`)
    return ((await response.json()) as { data: SessionJson[] }).data
  }

  /** Brings a session into memory. */
  async reload(id: string): Promise<void> {
    const response = await fetch(`${this.url}/v1/sessions/${id}/reload`, { method: 'POST' })
    assert.ok(response.ok, `${id} is not reloaded: ${await response.text()}`)
    for (;;) {
      const session = (await this.sessions()).find((session) => session.id === id)
      assert.ok(session, `${id} was lost on its way`)
      if (session.where === 'memory') return
      await sleep(5)
    }
  }

  private assertAlone(): void {
    try {
      process.kill(-this.child.pid!, 0)
    } catch {
      return
    }
    throw new Error(`processes of its group ${this.child.pid} are left`)
  }
}

interface Choices {
  choices: { logprobs: { tokens: string[]; token_logprobs: number[] } | null }[]
  usage?: { prompt_tokens_details: { cached_tokens: number } }
}

/**
 * Asks for a greedy answer and compares it as far as it comes, be it cut off in the end.
 * @param prompt without an answer: there is nothing to compare yet
 * @param leaveAfterMs when the client hangs up
 * @throws AssertionError if it is another; what `fetch` throws if the server goes away
 */
export async function askServer(
  url: string,
  prompt: { tokens: number[]; answer?: AnswerTokens },
  maxTokens: number,
  stream: boolean,
  leaveAfterMs = Infinity,
): Promise<{ answer: AnswerTokens; cached: number }> {
  const leaving = leaveAfterMs < Infinity ? AbortSignal.timeout(leaveAfterMs) : undefined
  const answer: AnswerTokens = []
  let cached = 0
  const take = ({ choices, usage }: Choices): void => {
    for (const { logprobs } of choices) {
      logprobs?.tokens.forEach((text, i) => answer.push([text, logprobs.token_logprobs[i]!]))
    }
    if (prompt.answer) assert.deepEqual(answer, prompt.answer.slice(0, answer.length))
    if (usage) cached = usage.prompt_tokens_details.cached_tokens
  }
  try {
    const response = await fetch(`${url}/v1/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({
        prompt: prompt.tokens,
        max_tokens: maxTokens,
        temperature: 0,
        ignore_eos: true,
        logprobs: 1,
        ...(stream && { stream, stream_options: { include_usage: true } }),
      }),
      ...(leaving && { signal: leaving }),
    })
    assert.equal(response.status, 200, `it answers ${response.status}`)
    if (!stream) take((await response.json()) as Choices)
    else for await (const event of eventsOf(response)) take(event)
  } catch (thrown) {
    if (!leaving?.aborted || thrown instanceof assert.AssertionError) throw thrown
    return { answer, cached }
  }
  assert.equal(answer.length, maxTokens, 'the answer is as long as it was asked to be')
  return { answer, cached }
}

/** Each event of a stream as it arrives. */
async function* eventsOf(response: Response): AsyncGenerator<Choices> {
  let text = ''
  const decoder = new TextDecoder()
  for await (const bytes of response.body!) {
    text += decoder.decode(bytes, { stream: true })
    const frames = text.split('\n\n')
    text = frames.pop()!
    for (const frame of frames) {
      const data = frame.slice('data: '.length)
      if (data === '[DONE]') return
      const event = JSON.parse(data) as Choices & { error?: unknown }
      assert.equal(event.error, undefined, `an error in a stream: ${data}`)
      yield event
    }
  }
  throw new Error('the stream was cut off')
}
