// Owns answering plain prompts on the ring thread itself: bytes become tokens here and go straight
// into the engine's queue, past the main thread, which passes on what the engine answers.

import { isUtf8 } from 'node:buffer'
import type { DirectPlace } from '../engine/api.ts'
import { DirectQueue } from '../engine/handover.ts'
import type { Detokenizer, Tokenizer } from '../text/tokenizer.ts'
import { requestName } from './decisions.ts'
import type { WireAnswer, WireRequest } from './exchange.ts'
import { PREFIX_LADDER, type MessageCode, type WireUsage } from './protocol.ts'
import { decode, isWithinBounds, seedOf } from './wire-prompt.ts'

/** What the ring thread needs of an engine of this process. */
export interface DirectOptions {
  place: DirectPlace
  /** Of the model's file: the thread has a tokenizer of its own. */
  modelPath: string
  /** The engine's route; other replicas are elsewhere. */
  route: number
  /** By tenant, as the engine knows them. */
  names: ReadonlyMap<number, string>
  /** Prompts that are in memory are to be told. */
  publishes: boolean
}

/** What the engine says of a prompt that was queued here. */
export type DirectNews =
  | { kind: 'direct-start'; id: number; cachedTokens: number }
  | { kind: 'direct-token'; id: number; token: number }
  | { kind: 'direct-end'; id: number; code: MessageCode; outputTokens: number; why?: string }
  /** The engine has stopped. */
  | { kind: 'direct-stop'; code: MessageCode }

/** What the main thread is told of it. */
export type DirectReport =
  | { kind: 'direct-abort'; id: number }
  | { kind: 'direct-computed'; wire: WireRequest; tokens: Int32Array }
  | { kind: 'direct-failed'; tenant: number; request: bigint; why: string }

/** Encoding holds up the rings: a longer prompt is the main thread's. */
export const DIRECT_BYTES_MAX = 16 << 10

interface Running {
  answer: WireAnswer
  tenant: number
  request: bigint
  usage: WireUsage
  /** From the first token on. */
  detokenizer: Detokenizer | undefined
  /** Until it is told that they are in memory. */
  prompt: { wire: WireRequest; tokens: Int32Array } | undefined
}

export class DirectAnswers {
  private readonly options: DirectOptions
  private readonly tokenizer: Tokenizer
  private readonly queue: DirectQueue
  private readonly say: (report: DirectReport) => void
  private readonly running = new Map<number, Running>()

  constructor(options: DirectOptions, tokenizer: Tokenizer, say: (report: DirectReport) => void) {
    this.options = options
    this.tokenizer = tokenizer
    this.queue = new DirectQueue(options.place)
    this.say = say
  }

  /**
   * Queues a prompt; `tell` makes it known.
   * @returns what aborts it; undefined if it is for the main thread: chat, long, or to be refused
   */
  start(wire: WireRequest, answer: WireAnswer): (() => void) | undefined {
    const { tenant, request, prompt, raw, maxTokens, sampling } = wire
    const { route, names, publishes } = this.options
    if (wire.chat || wire.route !== route || prompt.length > DIRECT_BYTES_MAX) return undefined
    if (!isWithinBounds(wire)) return undefined
    if (!isUtf8(prompt)) return undefined
    const tokens = this.encode(prompt, !raw)
    const { temperature, topP, seed } = sampling
    const id = this.queue.submit({
      requestId: requestName(request),
      tenant: names.get(tenant) ?? 'default',
      prompt: tokens,
      temperature,
      topP,
      seed: seedOf(seed),
      maxTokens,
    })
    if (id === undefined) return undefined
    const isPublished = publishes && prompt.length >= PREFIX_LADDER[0]
    this.running.set(id, {
      ...{ answer, tenant, request },
      usage: { promptTokens: tokens.length, cachedTokens: 0, outputTokens: 0 },
      detokenizer: undefined,
      prompt: isPublished ? { wire, tokens: tokens.slice() } : undefined,
    })
    return () => {
      if (this.running.delete(id)) this.say({ kind: 'direct-abort', id })
    }
  }

  /** Valid until the next one. */
  private encode(utf8: Uint8Array, addSpecial: boolean): Int32Array {
    const { tokenizer } = this
    const tokens = tokenizer.encodeUtf8?.(utf8, addSpecial)
    return tokens ?? tokenizer.encode(decode(utf8) ?? '', { addSpecial, parseSpecial: false })
  }

  /** Wakes the engine if anything was queued. */
  tell(): void {
    this.queue.tell()
  }

  /** What the engine says; of what has been aborted it may still say something. */
  hear(news: DirectNews): void {
    if (news.kind === 'direct-stop') {
      for (const id of [...this.running.keys()]) this.end(id, news.code, 0)
    } else if (news.kind === 'direct-end') this.end(news.id, news.code, news.outputTokens, news.why)
    else {
      const running = this.running.get(news.id)
      if (!running) return
      if (news.kind === 'direct-start') running.usage.cachedTokens = news.cachedTokens
      else this.hearToken(running, news.token)
    }
  }

  private hearToken(running: Running, token: number): void {
    running.usage.outputTokens++
    running.detokenizer ??= this.tokenizer.detokenizer({ skipSpecial: true })
    running.answer.tokens([token], running.detokenizer.push(token))
    if (running.prompt) this.say({ kind: 'direct-computed', ...running.prompt })
    running.prompt = undefined
  }

  /** @param outputTokens 0 if the engine cannot say */
  private end(id: number, code: MessageCode, outputTokens: number, why?: string): void {
    const running = this.running.get(id)
    if (!running) return
    this.running.delete(id)
    const { answer, usage, tenant, request, detokenizer } = running
    const rest = detokenizer?.end() ?? ''
    if (rest !== '') answer.tokens([], rest)
    if (why !== undefined) this.say({ kind: 'direct-failed', tenant, request, why })
    answer.end(code, { ...usage, outputTokens: Math.max(outputTokens, usage.outputTokens) })
  }
}
