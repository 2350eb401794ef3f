// Owns a scripted engine and a byte tokenizer for tests of generation: every token is given in
// advance, and the test says when a step happens.

import type {
  Engine,
  EngineSnapshot,
  FinishReason,
  SequenceChoice,
  SequenceHandle,
  SequenceRequest,
  SequenceSink,
} from '../../src/engine/api.ts'
import type { LatticeError } from '../../src/errors.ts'
import type { Detokenizer, Tokenizer } from '../../src/text/tokenizer.ts'

/** The byte tokenizer's only special token, which ends a text. */
export const EOS = 256

/** A token is a byte of UTF-8; EOS has no text. */
export class ByteTokenizer implements Tokenizer {
  readonly vocabSize = 257
  readonly bosToken = undefined
  readonly eosTokens = [EOS]

  encode(text: string): Int32Array {
    return Int32Array.from(new TextEncoder().encode(text))
  }

  tokenBytes(token: number): Uint8Array {
    return token === EOS ? new Uint8Array(0) : Uint8Array.of(token)
  }

  decode(tokens: ArrayLike<number>): string {
    return new TextDecoder().decode(Uint8Array.from(tokens))
  }

  detokenizer(): Detokenizer {
    const decoder = new TextDecoder()
    return {
      push: (token) => decoder.decode(this.tokenBytes(token), { stream: true }),
      end: () => decoder.decode(),
    }
  }

  isSpecial(token: number): boolean {
    return token === EOS
  }

  tokenText(token: number): string {
    return token === EOS ? '<eos>' : String.fromCharCode(token)
  }
}

export interface FakeSequence {
  request: SequenceRequest
  sink: SequenceSink
  tokens: readonly number[]
  next: number
  aborted: boolean
  ended: boolean
}

/** Delivers scripted tokens; at their end it finishes as `length`. */
export class FakeEngine implements Engine {
  readonly model = { id: 'fake', architecture: 'none', contextLength: 1e9, vocabSize: 257 }
  readonly sequences: FakeSequence[] = []
  /** Tokens delivered before `submit` returns. */
  early = 0
  /** Thrown by the submit with this index. */
  failure: { at: number; error: LatticeError } | undefined
  readonly #script: (index: number) => readonly number[]

  constructor(script: (index: number) => readonly number[]) {
    this.#script = script
  }

  submitChoices(request: SequenceRequest, choices: readonly SequenceChoice[]): SequenceHandle[] {
    const last = this.sequences.length + choices.length - 1
    if (this.failure && this.failure.at <= last) throw this.failure.error
    return choices.map(({ sampling, sink }) => this.submit({ ...request, sampling }, sink))
  }

  submit(request: SequenceRequest, sink: SequenceSink): SequenceHandle {
    const index = this.sequences.length
    const tokens = this.#script(index)
    const sequence = { request, sink, tokens, next: 0, aborted: false, ended: false }
    this.sequences.push(sequence)
    for (let i = 0; i < this.early; i++) this.advance(sequence)
    return {
      abort: () => {
        sequence.aborted = true
      },
      fork: (choice) => this.submit({ ...request, sampling: choice.sampling }, choice.sink),
    }
  }

  /** One step: a token for each running sequence, and the end of aborted ones. */
  step(): void {
    for (const sequence of this.sequences) this.advance(sequence)
  }

  get running(): number {
    return this.sequences.filter((sequence) => !sequence.ended).length
  }

  advance(sequence: FakeSequence): void {
    if (sequence.ended) return
    if (sequence.aborted) return this.finish(sequence, 'abort')
    const token = sequence.tokens[sequence.next]
    if (token === undefined) return this.finish(sequence, 'length')
    sequence.next += 1
    if (sequence.request.stopTokens.includes(token)) return this.finish(sequence, 'stop')
    const logprobs =
      sequence.request.topLogprobs === undefined ? undefined : { logprob: -token, top: [] }
    sequence.sink.onToken(token, logprobs)
    if (sequence.next === sequence.request.maxTokens) this.finish(sequence, 'length')
  }

  finish(sequence: FakeSequence, reason: FinishReason, error?: LatticeError): void {
    sequence.ended = true
    sequence.sink.onFinish(reason, sequence.next, error)
  }

  queueRoom(): number {
    return 1_000
  }

  snapshot(): Promise<EngineSnapshot> {
    throw new Error('the fake engine has no snapshot')
  }

  ask(): Promise<never> {
    throw new Error('the fake engine has no answers')
  }

  async drain(): Promise<void> {}

  async close(): Promise<void> {}
}
