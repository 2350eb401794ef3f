// Owns an engine that computes nothing, for measuring the way to an engine and back: a token comes
// at each step, as fast as it is told to.

import type {
  Engine,
  EngineAnswers,
  EngineQuestion,
  EngineSnapshot,
  SequenceChoice,
  SequenceHandle,
  SequenceRequest,
  SequenceSink,
} from '../../engine/api.ts'
import { LatticeError } from '../../errors.ts'
import type { Tokenizer } from '../../text/tokenizer.ts'

const MODEL = { id: 'bench', architecture: 'none', contextLength: 1 << 24, vocabSize: 256 }
const TOKEN = 97

export class BenchEngine implements Engine {
  readonly model = MODEL
  /** Refuses everything, as a full queue does. */
  full = false
  /** 0 steps once a turn of the event loop. */
  stepMs = 0
  private readonly running = new Set<() => boolean>()
  private scheduled = false

  submit(request: SequenceRequest, sink: SequenceSink): SequenceHandle {
    return this.submitChoices(request, [{ sampling: request.sampling, sink }])[0]!
  }

  submitChoices(request: SequenceRequest, choices: readonly SequenceChoice[]): SequenceHandle[] {
    if (this.full) throw new LatticeError('queue_full', 'The queue is full.')
    return choices.map(({ sink }) => {
      let outputs = 0
      let aborted = false
      sink.onStart?.(0)
      const step = (): boolean => {
        if (aborted) return this.end(sink, 'abort', outputs)
        outputs++
        sink.onToken(TOKEN, undefined)
        return outputs < request.maxTokens || this.end(sink, 'length', outputs)
      }
      this.running.add(step)
      this.schedule()
      return {
        abort: () => void (aborted = true),
        fork: () => {
          throw new LatticeError('engine_stopped', 'Nothing forks here.')
        },
      }
    })
  }

  queueRoom(): number {
    return this.full ? 0 : 1 << 20
  }

  async snapshot(): Promise<EngineSnapshot> {
    throw new LatticeError('engine_stopped', 'There is nothing to see.')
  }

  async ask<Q extends EngineQuestion>(_question: Q): Promise<EngineAnswers[Q['kind']]> {
    throw new LatticeError('engine_stopped', 'There is nothing to ask.')
  }

  async drain(): Promise<void> {}

  async close(): Promise<void> {
    this.running.clear()
  }

  private end(sink: SequenceSink, reason: 'abort' | 'length', outputs: number): false {
    sink.onFinish(reason, outputs, undefined)
    return false
  }

  private schedule(): void {
    if (this.scheduled) return
    this.scheduled = true
    const step = (): void => {
      this.scheduled = false
      for (const advance of this.running) if (!advance()) this.running.delete(advance)
      if (this.running.size > 0) this.schedule()
    }
    if (this.stepMs > 0) setTimeout(step, this.stepMs)
    else setImmediate(step)
  }
}

/** A token a byte. */
export const BYTES: Tokenizer = {
  vocabSize: 256,
  bosToken: undefined,
  eosTokens: [],
  encode: (text) => new Int32Array(Buffer.from(text)),
  tokenBytes: (token) => Uint8Array.of(token),
  decode: (tokens) => Buffer.from(Array.from(tokens)).toString(),
  detokenizer: () => ({ push: (token) => String.fromCharCode(token), end: () => '' }),
  isSpecial: () => false,
  tokenText: (token) => String.fromCharCode(token),
}
