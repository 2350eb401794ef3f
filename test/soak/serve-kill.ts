// Owns the crash test of `lattice serve --kv-store`: the server is killed at any moment under load,
// and the next one must start, answer to the token, and find every prompt that was durable.
//
//   node test/soak/serve-kill.ts [KILLS] [SEED] [--model FILE]

import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { mkdirSync, readdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { hostKvLayout } from '../../src/backends/cpu/kv-memory.ts'
import { liveBytes } from '../../src/kv/layout.ts'
import { openModel } from '../../src/model/load.ts'
import { Random } from '../support/random.ts'
import {
  askServer,
  type Expected,
  ServeProcess,
  type SessionJson,
} from '../support/serve-process.ts'
import { temporaryDirectory } from '../support/temporary.ts'
import { quantized, tinyLlama, writeTinyGguf } from '../support/tiny-gguf.ts'

export interface Kills {
  kills: number
  /** Of these, before the server was ready. */
  starting: number
  /** Whole answers, each as it should be; and requests that a kill cut off. */
  answers: number
  cut: number
  /** Prompts that were known to be durable, and how often one was looked for after a kill. */
  durable: number
  looked: number
  /** How many of these were asked for again, and of their tokens how many were found. */
  asked: number
  foundTokens: number
  /** Records that were torn or whose place was used again, over all starts. */
  lost: number
  slowestStartMs: number
}

interface Prompt extends Expected {
  /** Of what is cached of it. */
  session: string
}

/** A store whose prompts all have room, so that none may be lost; or one where they have not. */
interface Store {
  directory: string
  tokens: number
  durable: Set<Prompt>
  /** Asked for until they are durable, too. */
  fresh: Prompt[]
  unused: Prompt[]
}

const CONTEXT = 512
const PROMPTS = 64
const BEGINNINGS = 8
const OUTPUT_TOKENS = 12
/** A prompt's last tokens, which are computed anew whatever is cached (decision 5). */
const COMPUTED_MIN = 64
/** The most that each store holds, and memory; all prompts have 20,000 tokens. */
const [ROOMY_TOKENS, TIGHT_TOKENS] = [40_000, 4_000]
const [MEMORY_TOKENS, CACHE_TOKENS] = [4_000, 2_000]
const CLIENTS = 6
const LOAD_MS = 800

/** @throws Error for whatever is not as it should be, with the server's own words */
export async function killServer(kills: number, seed: number, modelPath?: string): Promise<Kills> {
  const soak = new Soak(seed, modelPath ?? writeTinyGguf(quantized(tinyLlama())))
  try {
    await soak.prepare()
    while (soak.report.kills < kills) await soak.live()
    await soak.end()
  } finally {
    await soak.server?.kill()
  }
  return soak.report
}

class Soak {
  readonly report: Kills = {
    kills: 0,
    starting: 0,
    answers: 0,
    cut: 0,
    durable: 0,
    looked: 0,
    asked: 0,
    foundTokens: 0,
    lost: 0,
    slowestStartMs: 0,
  }
  server: ServeProcess | undefined
  private readonly random: Random
  private readonly model: string
  private readonly directory = temporaryDirectory('serve-kill')
  private readonly tokenBytes: number
  private prompts: Prompt[] = []
  private roomy: Store
  private readonly tight: Store
  private stores = 0

  constructor(seed: number, model: string) {
    this.random = new Random(seed)
    this.model = model
    this.tokenBytes = liveBytes(hostKvLayout(openModel(model).config, CONTEXT), 1)
    writeFileSync(join(this.directory, 'key'), new Uint8Array(32).fill(seed), { mode: 0o600 })
    mkdirSync(join(this.directory, 'tmp'))
    this.roomy = this.newStore(ROOMY_TOKENS)
    this.tight = this.newStore(TIGHT_TOKENS)
  }

  /** What each prompt's answer is, by a server that caches nothing. */
  async prepare(): Promise<void> {
    const { random } = this
    const draw = (count: number) => Array.from({ length: count }, () => random.between(2, 250))
    const beginnings = Array.from({ length: BEGINNINGS }, () => draw(random.between(100, 250)))
    const server = await this.start([])
    for (let i = 0; i < PROMPTS; i++) {
      const tokens = [...random.pick(beginnings), ...draw(random.between(70, 200))]
      const { answer } = await askServer(server.url, { tokens }, OUTPUT_TOKENS, false)
      assert.equal(answer.length, OUTPUT_TOKENS)
      this.prompts.push({ tokens, answer, session: sessionOf(tokens) })
    }
    await server.stop()
    this.tight.unused = this.prompts
    this.roomy.unused = [...this.prompts]
  }

  /** From one start to the kill that ends it. */
  async live(): Promise<void> {
    const { random, report } = this
    const store = report.kills % 3 === 2 ? this.tight : this.renewed()
    report.kills++
    if (random.chance(0.15)) {
      report.starting++
      this.server = this.spawn(this.storeFlags(store))
      await sleep(random.below(700))
      return this.server.kill()
    }
    await this.startOn(store)
    await this.findDurable(store)
    await this.load(store)
  }

  /** Both stores once more; their servers end as they are asked to. */
  async end(): Promise<void> {
    const store = this.renewed()
    const server = await this.startOn(store)
    await this.findDurable(store)
    this.offerMore(store)
    for (const prompt of store.fresh) await this.ask(prompt, OUTPUT_TOKENS, false)
    await this.watch(store, new AbortController().signal, true)
    await server.stop()
    for (const store of [this.roomy, this.tight]) {
      const server = await this.startOn(store)
      await this.findDurable(store)
      await server.stop()
      const [inside = ''] = readdirSync(store.directory)
      const files = readdirSync(join(store.directory, inside)).toSorted()
      assert.deepEqual(files, ['columns', 'lock', 'log'])
    }
    assert.deepEqual(readdirSync(join(this.directory, 'tmp')), [], 'temporary files are left')
  }

  /** The store that loses nothing, or the next such one when all prompts are in it. */
  private renewed(): Store {
    const { unused, fresh } = this.roomy
    if (unused.length + fresh.length > 0) return this.roomy
    this.roomy = this.newStore(ROOMY_TOKENS)
    this.roomy.unused = [...this.prompts]
    return this.roomy
  }

  private newStore(tokens: number): Store {
    const directory = join(this.directory, `store-${this.stores++}`)
    return { directory, tokens, durable: new Set(), fresh: [], unused: [] }
  }

  private storeFlags({ directory, tokens }: Store): string[] {
    const place = ['--kv-store', directory, '--kv-store-key', join(this.directory, 'key')]
    const cache = ['--prefix-cache', `${CACHE_TOKENS * this.tokenBytes}`]
    return [...cache, '--kv-offload', `${tokens * this.tokenBytes}`, ...place]
  }

  private spawn(flags: readonly string[]): ServeProcess {
    const memory = ['--kv-memory', `${MEMORY_TOKENS * this.tokenBytes}`]
    const load = ['--max-sequences', `${CLIENTS}`, '--threads', '1', '--context', `${CONTEXT}`]
    const all = ['--model', this.model, ...memory, ...load, ...flags]
    return new ServeProcess(all, { TMPDIR: join(this.directory, 'tmp') })
  }

  private async start(flags: readonly string[]): Promise<ServeProcess> {
    this.server = this.spawn(flags)
    const startMs = performance.now()
    await this.server.ready()
    const ms = Math.round(performance.now() - startMs)
    this.report.slowestStartMs = Math.max(this.report.slowestStartMs, ms)
    return this.server
  }

  /** The server says how much it found; where there is room it must be all that was durable. */
  private async startOn(store: Store): Promise<ServeProcess> {
    const server = await this.start(this.storeFlags(store))
    const said = /^store +(\d+) prefixes .*, (nothing|\d+) .*lost$/m.exec(server.output)
    assert.ok(said, `it does not say what it found:\n${server.output}`)
    const found = Number(said[1])
    if (said[2] !== 'nothing') this.report.lost += Number(said[2])
    assert.ok(found >= store.durable.size, `${found} found, ${store.durable.size} were durable`)
    return server
  }

  private async findDurable({ durable }: Store): Promise<void> {
    const { random, report } = this
    const server = this.server!
    const there = new Map((await server.sessions()).map((session) => [session.id, session]))
    for (const { session } of durable) {
      assert.ok(
        there.get(session)?.durable,
        `${session} was durable and is gone:\n${server.output}`,
      )
      report.looked++
    }
    const some = [...durable]
    for (let i = 0; i < 3 && some.length > 0; i++) {
      const [prompt] = some.splice(random.below(some.length), 1)
      // Reading is cheaper than computing until both were measured; later it has to be asked for.
      if (i > 0) await server.reload(prompt!.session)
      const { cached } = await this.ask(prompt!, OUTPUT_TOKENS, i === 0)
      const expected = prompt!.tokens.length - COMPUTED_MIN
      assert.equal(cached, expected, `of ${prompt!.tokens.length} tokens that were durable`)
      report.asked++
      report.foundTokens += cached
    }
  }

  private async load(store: Store): Promise<void> {
    const { random } = this
    const server = this.server!
    const killed = new AbortController()
    this.offerMore(store)
    const clients = Array.from({ length: CLIENTS }, () => this.client(store, killed.signal))
    const working = Promise.all(clients)
    const endMs = performance.now() + random.below(LOAD_MS)
    const watching =
      store === this.tight ? working : this.watch(store, killed.signal, random.chance(0.3))
    await Promise.race([sleep(Math.max(0, endMs - performance.now())), working, watching])
    killed.abort()
    await server.kill()
    await Promise.all([working, watching])
  }

  /** One request after another until the kill. */
  private async client(store: Store, killed: AbortSignal): Promise<void> {
    const { random, report } = this
    while (!killed.aborted) {
      const known = store === this.tight ? store.unused : [...store.durable]
      const prompt =
        store.fresh.length > 0 && (known.length === 0 || random.chance(0.4))
          ? random.pick(store.fresh)
          : random.pick(known)
      const leaves = random.chance(0.1) ? random.below(30) : Infinity
      try {
        const stream = leaves < Infinity || random.chance(0.5)
        await this.ask(prompt, random.between(1, OUTPUT_TOKENS), stream, leaves)
        report.answers++
      } catch (thrown) {
        if (thrown instanceof assert.AssertionError || !killed.aborted) throw thrown
        report.cut++
      }
    }
  }

  /**
   * Has new prompts asked for, a few at a time, once all that were are durable.
   * @param once the load ends when the first of them is
   */
  private async watch(store: Store, killed: AbortSignal, once: boolean): Promise<void> {
    for (let found = false; !killed.aborted && !(found && once); await sleep(5)) {
      let sessions: SessionJson[]
      try {
        sessions = await this.server!.sessions()
      } catch (thrown) {
        if (killed.aborted) return
        throw thrown
      }
      const durable = new Set(sessions.filter(({ durable }) => durable).map(({ id }) => id))
      for (const { session } of store.durable) {
        assert.ok(durable.has(session), `${session} is durable no more`)
      }
      for (const prompt of store.fresh) if (durable.has(prompt.session)) store.durable.add(prompt)
      const count = store.fresh.length
      store.fresh = store.fresh.filter((prompt) => !store.durable.has(prompt))
      found = store.fresh.length < count
      this.report.durable += count - store.fresh.length
      this.offerMore(store)
    }
  }

  private offerMore(store: Store): void {
    if (store === this.tight || store.fresh.length > 0) return
    store.fresh = store.unused.splice(0, this.random.between(3, 8))
  }

  /** @throws AssertionError if what is answered, however little, is not as it should be */
  private ask(
    prompt: Prompt,
    maxTokens: number,
    stream: boolean,
    leaveAfterMs = Infinity,
  ): Promise<{ cached: number }> {
    return askServer(this.server!.url, prompt, maxTokens, stream, leaveAfterMs)
  }
}

/** As the engine names it (src/engine/sessions.ts). */
function sessionOf(tokens: readonly number[]): string {
  const hash = createHash('sha256').update(new Uint8Array(Int32Array.from(tokens).buffer))
  return `session-${hash.digest('hex').slice(0, 16)}`
}

if (import.meta.main) {
  const { values, positionals } = parseArgs({
    options: { model: { type: 'string' } },
    allowPositionals: true,
  })
  const [kills = '100', seed = `${Date.now() % 1e9}`] = positionals
  console.log(`seed ${seed}`)
  console.log(JSON.stringify(await killServer(Number(kills), Number(seed), values.model)))
}
