// Owns the far end of what `lattice bench ingress` calls delivery: a real engine's thread and
// scheduler, whose one place is taken, so that every prompt stays in its queue until it is let go;
// and the CPU time that was spent until then, thread by thread.

import { readdirSync, readFileSync } from 'node:fs'
import {
  type Engine,
  type EngineAnswers,
  type EngineQuestion,
  type EngineSnapshot,
  GREEDY,
  type SequenceChoice,
  type SequenceHandle,
  type SequenceRequest,
  type SequenceSink,
} from '../../engine/api.ts'
import { EngineClient } from '../../engine/client.ts'

/** A step of the sequence that has the place: long, so that it costs next to nothing. */
const STEP_MS = 100
const CONTEXT = 1 << 14
const MOST = 1 << 20
const SILENT: SequenceSink = { onToken: () => {}, onFinish: () => {} }

export class QueueEngine implements Engine {
  private readonly engine: EngineClient
  private readonly waiting: { handle: SequenceHandle; sink: SequenceSink }[] = []
  private taken: SequenceHandle | undefined
  private awaited: { count: number; resolve: () => void } | undefined

  private constructor(engine: EngineClient) {
    this.engine = engine
  }

  /** @param vocabSize of the tokenizer; 256 at least */
  static async start(vocabSize: number): Promise<QueueEngine> {
    const model = { id: 'bench', architecture: 'none', contextLength: CONTEXT, vocabSize }
    const engine = await EngineClient.start(
      {
        backend: { kind: 'null', vocab: 256, stepMs: STEP_MS },
        contextLength: CONTEXT,
        maxSequences: 1,
        stepTokens: 64,
        kvBytes: 1 << 26,
      },
      model,
      { sequences: MOST, contextLength: CONTEXT },
    )
    const queue = new QueueEngine(engine)
    queue.take()
    return queue
  }

  get model(): Engine['model'] {
    return this.engine.model
  }

  submit(request: SequenceRequest, sink: SequenceSink): SequenceHandle {
    return this.submitChoices(request, [{ sampling: request.sampling, sink }])[0]!
  }

  submitChoices(request: SequenceRequest, choices: readonly SequenceChoice[]): SequenceHandle[] {
    const silent = choices.map(({ sampling }) => ({ sampling, sink: SILENT }))
    const handles = this.engine.submitChoices(request, silent)
    handles.forEach((handle, i) => this.waiting.push({ handle, sink: choices[i]!.sink }))
    if (this.awaited && this.waiting.length >= this.awaited.count) this.awaited.resolve()
    return handles
  }

  /** Resolves when so many prompts lie in the scheduler's queue. */
  async queued(count: number): Promise<void> {
    await new Promise<void>((resolve) => {
      this.awaited = { count, resolve }
      if (this.waiting.length >= count) resolve()
    })
    this.awaited = undefined
    // An older snapshot comes if the engine is within a step.
    while ((await this.engine.snapshot()).waiting < count);
  }

  /** Ends them all, as the shortest answers that there are. */
  release(): void {
    for (const { handle, sink } of this.waiting.splice(0)) {
      handle.abort()
      sink.onFinish('length', 0, undefined)
    }
  }

  queueRoom(): number {
    return this.engine.queueRoom()
  }

  snapshot(): Promise<EngineSnapshot> {
    return this.engine.snapshot()
  }

  ask<Q extends EngineQuestion>(question: Q): Promise<EngineAnswers[Q['kind']]> {
    return this.engine.ask(question)
  }

  drain(): Promise<void> {
    return this.engine.drain()
  }

  async close(): Promise<void> {
    this.taken?.abort()
    await this.engine.close()
  }

  /** For as long as one sequence may be; then another one takes it. */
  private take(): void {
    this.taken = this.engine.submit(
      {
        requestId: 'bench-first',
        tenant: 'bench',
        prompt: Int32Array.of(1),
        sampling: GREEDY,
        maxTokens: CONTEXT - 2,
        stopTokens: [],
        topLogprobs: undefined,
      },
      { ...SILENT, onFinish: (reason) => reason === 'length' && this.take() },
    )
  }
}

/** CPU time of each thread of this process, and of others by id, in ns, by name. */
export function cpuTimes(others: readonly number[]): Record<string, number> {
  const times: Record<string, number> = {}
  const add = (folder: string): void => {
    try {
      const name = readFileSync(`${folder}/comm`, 'utf8').trim()
      const ns = Number(readFileSync(`${folder}/schedstat`, 'utf8').split(' ')[0])
      times[name] = (times[name] ?? 0) + ns
    } catch {
      // It has ended.
    }
  }
  for (const task of readdirSync('/proc/self/task')) add(`/proc/self/task/${task}`)
  for (const id of others) add(`/proc/${id}`)
  return times
}

/** Kernel threads that take an interface's frames from its driver. */
export function napiThreads(name: string): number[] {
  return readdirSync('/proc')
    .filter((entry) => /^\d+$/.test(entry))
    .map(Number)
    .filter((id) => {
      try {
        return readFileSync(`/proc/${id}/comm`, 'utf8').startsWith(`napi/${name}`)
      } catch {
        return false
      }
    })
}
