// Owns the short way into the engine's queue: another thread writes prompts to memory that the
// engine's thread reads. Whatever is unusual about one is left to the long way, which explains it.

import { GREEDY, type DirectPlace, type SequenceRequest } from './api.ts'

/** What a prompt has that comes this way. */
export interface DirectRequest {
  requestId: string
  tenant: string
  prompt: Int32Array
  temperature: number
  topP: number
  /** At most 52 bits. */
  seed: number
  maxTokens: number
}

/** Words of what an engine's client and the other thread both count. */
export const COUNTS = {
  nextId: 0,
  /** Sequences that run or wait. */
  live: 1,
  /** 1 if none is taken any more. */
  closed: 2,
  words: 3,
} as const

/** Words of the memory before its records. */
const WRITTEN = 0
const READ = 1
const FIRST = 2
/** Instead of a record's length: the next one is at the beginning. */
const SKIP = -1
/** Of a record: its length, an id, five numbers, three halves of a number twice. */
const HEAD_WORDS = 12
/** A thousand prompts of 4 KiB; who finds it full goes the long way. */
const RECORD_WORDS = 1 << 20

/** @param recordWords a record is smaller */
export function handoverMemory(recordWords = RECORD_WORDS): SharedArrayBuffer {
  return new SharedArrayBuffer(4 * (FIRST + recordWords))
}

/** The end of the thread that prompts come from; there is one. */
export class DirectQueue {
  private readonly place: DirectPlace
  private readonly control: Int32Array
  private readonly words: Int32Array
  private readonly counts: Int32Array
  private readonly signal: Int32Array
  private readonly numbers = new Float64Array(3)
  private readonly halves = new Int32Array(this.numbers.buffer)
  private at = 0
  private isTold = true

  constructor(place: DirectPlace) {
    this.place = place
    this.control = new Int32Array(place.memory, 0, FIRST)
    this.words = new Int32Array(place.memory, 4 * FIRST)
    this.counts = new Int32Array(place.counts)
    this.signal = new Int32Array(place.signal)
  }

  /**
   * Queues a prompt; `tell` makes it known.
   * @returns the sequence's id; undefined if the engine's client has to look at it, or to refuse it
   */
  submit(request: DirectRequest): number | undefined {
    const { prompt, maxTokens } = request
    const { tokensMax, sequences } = this.place
    if (prompt.length === 0 || maxTokens < 1 || prompt.length + maxTokens > tokensMax) return
    const { counts } = this
    // Counted first: who closes either sees it, or is seen here.
    if (Atomics.add(counts, COUNTS.live, 1) < sequences && !Atomics.load(counts, COUNTS.closed)) {
      const id = Atomics.add(counts, COUNTS.nextId, 1)
      if (this.write(id, request)) return id
    }
    Atomics.sub(counts, COUNTS.live, 1)
    return undefined
  }

  /** Wakes the engine if it sleeps and anything was queued. */
  tell(): void {
    if (this.isTold) return
    this.isTold = true
    Atomics.add(this.signal, 0, 1)
    Atomics.notify(this.signal, 0)
  }

  private write(id: number, request: DirectRequest): boolean {
    const { requestId, tenant, prompt, maxTokens } = request
    const { words, numbers } = this
    const length = HEAD_WORDS + prompt.length + requestId.length + tenant.length
    const at = this.room(length)
    if (at === undefined) return false
    words[at] = length
    words[at + 1] = id
    words[at + 2] = maxTokens
    words[at + 3] = prompt.length
    words[at + 4] = requestId.length
    words[at + 5] = tenant.length
    numbers[0] = request.temperature
    numbers[1] = request.topP
    numbers[2] = request.seed
    for (let i = 0; i < this.halves.length; i++) words[at + 6 + i] = this.halves[i]!
    words.set(prompt, at + HEAD_WORDS)
    let to = at + HEAD_WORDS + prompt.length
    for (let i = 0; i < requestId.length; i++) words[to++] = requestId.charCodeAt(i)
    for (let i = 0; i < tenant.length; i++) words[to++] = tenant.charCodeAt(i)
    this.at = to
    Atomics.store(this.control, WRITTEN, to)
    this.isTold = false
    return true
  }

  /** Where so many words follow each other; never as many as would make full look like empty. */
  private room(length: number): number | undefined {
    const { at, words } = this
    const read = Atomics.load(this.control, READ)
    if (at < read) return at + length < read ? at : undefined
    if (at + length < words.length) return at
    if (length >= read) return undefined
    words[at] = SKIP
    return 0
  }
}

/** Tokens of prompts that are not long go to memory of so many words, one after the other. */
const SLAB_WORDS = 1 << 14

/** The engine's end. */
export class DirectPrompts {
  private readonly control: Int32Array
  private readonly words: Int32Array
  private readonly stopTokens: readonly number[]
  private readonly numbers = new Float64Array(3)
  private readonly halves = new Int32Array(this.numbers.buffer)
  private read = 0
  private slab = new Int32Array(SLAB_WORDS)
  private slabUsed = 0
  /** That have not ended. */
  readonly live = new Set<number>()

  constructor({ memory, stopTokens }: DirectPlace) {
    this.control = new Int32Array(memory, 0, FIRST)
    this.words = new Int32Array(memory, 4 * FIRST)
    this.stopTokens = stopTokens
  }

  /** Everything that was written so far. */
  take(submit: (id: number, request: SequenceRequest) => void): void {
    while (this.read !== Atomics.load(this.control, WRITTEN)) {
      const { words, read } = this
      const length = words[read]!
      if (length === SKIP) this.read = 0
      else {
        const id = words[read + 1]!
        this.live.add(id)
        submit(id, this.requestAt(read))
        this.read += length
      }
      Atomics.store(this.control, READ, this.read)
    }
  }

  finished(id: number): void {
    this.live.delete(id)
  }

  private requestAt(at: number): SequenceRequest {
    const { words, halves, numbers, stopTokens } = this
    for (let i = 0; i < halves.length; i++) halves[i] = words[at + 6 + i]!
    const nameAt = at + HEAD_WORDS + words[at + 3]!
    const tenantAt = nameAt + words[at + 4]!
    return {
      requestId: textOf(words.subarray(nameAt, tenantAt)),
      tenant: textOf(words.subarray(tenantAt, tenantAt + words[at + 5]!)),
      prompt: this.tokens(at + HEAD_WORDS, nameAt),
      sampling: { ...GREEDY, temperature: numbers[0]!, topP: numbers[1]!, seed: numbers[2]! },
      maxTokens: words[at + 2]!,
      stopTokens,
      topLogprobs: undefined,
    }
  }

  /**
   * A copy. Memory for each would cost more than all the rest of it, here and to collect it; so one
   * that stays long keeps what its neighbours had, too: 64 KB at most.
   */
  private tokens(from: number, to: number): Int32Array {
    const { words } = this
    const count = to - from
    if (count > SLAB_WORDS / 8) return words.slice(from, to)
    if (this.slabUsed + count > SLAB_WORDS) {
      this.slab = new Int32Array(SLAB_WORDS)
      this.slabUsed = 0
    }
    const tokens = this.slab.subarray(this.slabUsed, this.slabUsed + count)
    tokens.set(words.subarray(from, to))
    this.slabUsed += count
    return tokens
  }
}

function textOf(codes: Int32Array): string {
  // Spread, they would be made an array first.
  return String.fromCharCode.apply(null, codes as unknown as number[])
}
