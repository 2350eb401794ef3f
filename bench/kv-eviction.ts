// Owns the measurement of what the prefix cache should forget: seeded traces of prompts run through
// the tree with each policy and budget, and what each finds is compared.
//
//   node bench/kv-eviction.ts [SEED]

import { EVICTION_NAMES, type EvictionName, recomputeCost } from '../src/kv/eviction.ts'
import { layerMajor, pagesFor } from '../src/kv/layout.ts'
import { PrefixCache } from '../src/kv/prefix.ts'
import { RegionTable, regionsFor, spannedTokens } from '../src/kv/regions.ts'
import { SlotTable } from '../src/kv/slots.ts'

const SEED = Number(process.argv[2] ?? 1)
const REQUESTS = 6000
const RUNNING = 16
/** A prompt's last tokens are always computed. */
const COMPUTE_MIN = 64
const layout = layerMajor({ layers: 30, rowBytes: 768, maxTokens: 8192, pageBytes: 4096 })

let state = SEED
/** In [0, 1), after mulberry32. */
function random(): number {
  state = (state + 0x6d2b79f5) | 0
  let t = Math.imul(state ^ (state >>> 15), 1 | state)
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
  return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
}

const between = (low: number, high: number) => low + Math.floor(random() * (high - low))
/** Of n things, the first most often: rank r is drawn like 1 / (r + 1). */
const zipf = (n: number) => Math.min(n - 1, Math.floor((n + 1) ** random()) - 1)

let fresh = 0
/** Tokens that occur nowhere else. */
const words = (length: number) => Int32Array.from({ length }, () => ++fresh)
const join = (...parts: Int32Array[]) => Int32Array.from(parts.flatMap((part) => [...part]))

/** Gives one prompt after the other. */
type Trace = () => Int32Array

/** Chats of up to eight turns, thirty at a time, each with one of twenty system prompts. */
function chats(): Trace {
  const systems = Array.from({ length: 20 }, () => words(between(100, 1500)))
  const begin = () => ({ tokens: systems[zipf(20)]!, turns: between(1, 9) })
  const open = Array.from({ length: 30 }, begin)
  return () => {
    const i = between(0, open.length)
    const chat = open[i]!
    const prompt = join(chat.tokens, words(between(20, 120)))
    chat.tokens = join(prompt, words(between(50, 250)))
    if (--chat.turns === 0 || chat.tokens.length > 7000) open[i] = begin()
    return prompt
  }
}

/** Questions about documents that a few ask about again and most nobody does. */
function documents(): Trace {
  const known = Array.from({ length: 40 }, () => words(between(1000, 6000)))
  return () => {
    const asked = random() < 0.5 ? known[zipf(40)]! : words(between(1000, 6000))
    return join(asked, words(between(10, 60)))
  }
}

/** Short prompts behind a few templates, and now and then a long text that comes once. */
function templates(): Trace {
  const heads = Array.from({ length: 100 }, () => words(between(80, 400)))
  return () =>
    random() < 0.05 ? words(between(4000, 8000)) : join(heads[zipf(100)]!, words(between(64, 300)))
}

function mixed(): Trace {
  const traces = [chats(), chats(), documents(), templates()]
  return () => traces[between(0, traces.length)]!()
}

/** Shares of prompt tokens, and of the work to compute them, that were found. */
function run(prompts: readonly Int32Array[], eviction: EvictionName, budget: number) {
  const mover = { map() {}, copy() {}, discard() {} }
  const regions = new RegionTable(layout, regionsFor(RUNNING), 1e9, mover)
  const slots = new SlotTable(regions, RUNNING)
  const cache = new PrefixCache(regions, budget, { eviction })
  const running: number[] = []
  let [asked, found, work, saved] = [0, 0, 0, 0]
  for (const prompt of prompts) {
    if (running.length === RUNNING) slots.retire(running.shift()!, -Infinity)
    while (slots.reclaim(Infinity) >= 0);
    const spans = cache.lookup('t', prompt, Math.max(0, prompt.length - COMPUTE_MIN))
    slots.pin(spans)
    let slot = -1
    while (slot < 0) {
      slot = spans.length > 0 ? slots.acquireShared(spans) : slots.acquire(prompt.length)
      if (slot < 0 && !cache.evict()) throw new Error('no region is left')
    }
    slots.grow(slot, prompt.length)
    running.push(slot)
    cache.insert('t', prompt, slots.spansOf(slot, prompt.length))
    asked += prompt.length
    found += spannedTokens(spans)
    work += recomputeCost(0, prompt.length)
    saved += recomputeCost(0, spannedTokens(spans))
  }
  return { tokens: found / asked, work: saved / work }
}

const percent = (share: number) => `${(100 * share).toFixed(1)} %`.padStart(8)

console.log(`seed ${SEED}, ${REQUESTS} prompts, ${RUNNING} at once; found of tokens / of work\n`)
console.log(`${''.padEnd(26)}${EVICTION_NAMES.map((name) => name.padStart(19)).join('')}`)
for (const trace of [chats, documents, templates, mixed]) {
  const next = trace()
  const prompts = Array.from({ length: REQUESTS }, next)
  for (const tokens of [10_000, 30_000, 100_000]) {
    const cells = EVICTION_NAMES.map((eviction) => {
      const result = run(prompts, eviction, pagesFor(layout, tokens))
      return `${percent(result.tokens)} /${percent(result.work)}`
    })
    console.log(`${trace.name.padEnd(12)}${`${tokens} tokens`.padEnd(14)}${cells.join(' ')}`)
  }
}
