// Owns the far end of what `lattice bench ingress` calls delivery: a real engine's thread and
// scheduler, whose one place is taken, so that every prompt stays in its queue until it is let go;
// and the CPU time that was spent until then, thread by thread.

import { readdirSync, readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import {
  type DirectSink,
  type DirectWay,
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
/** How often it is looked whether all prompts are there, at most: it costs time as well. */
const LOOK_MS = 20
/** This thread sleeps so long that the kernel counts what it has done. */
const SETTLE_MS = 2
const CONTEXT = 1 << 14
const MOST = 1 << 20
const SILENT: SequenceSink = { onToken: () => {}, onFinish: () => {} }

export class QueueEngine implements Engine {
  private readonly engine: EngineClient
  private readonly waiting: { handle: SequenceHandle; sink: SequenceSink }[] = []
  private taken: SequenceHandle | undefined
  private way: DirectWay | undefined

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
    return handles
  }

  /** Resolves when so many prompts lie in the scheduler's queue. */
  async queued(count: number): Promise<void> {
    const start = performance.now()
    // Prompts that come past this thread tell it nothing; it looks when they may all be there.
    for (;;) {
      const arrived = MOST - this.queueRoom() - 1
      if (arrived >= count) break
      const restMs = ((performance.now() - start) * (count - arrived)) / Math.max(1, arrived)
      await sleep(arrived > 0 ? Math.max(LOOK_MS, restMs) : LOOK_MS)
    }
    // Whatever it is asked, it takes in first what it was sent before.
    await this.engine.ask({ kind: 'unpin', tenant: 'bench', id: '' })
  }

  /** Ends them all, as the shortest answers that there are. */
  async release(): Promise<void> {
    // Of those that came past this thread only the engine knows; its first word may be an old one.
    while (this.way && this.way.running() > 0) {
      const { sequences } = await this.snapshot()
      for (const { id, state } of sequences) if (state === 'waiting') this.way.abort(id)
      await sleep(LOOK_MS)
    }
    for (const { handle, sink } of this.waiting.splice(0)) {
      handle.abort()
      sink.onFinish('length', 0, undefined)
    }
    // What still waits would count among the next round's.
    while (MOST - this.queueRoom() > 1) await sleep(LOOK_MS)
  }

  direct(sink: DirectSink, stopTokens: readonly number[]): DirectWay {
    return (this.way = this.engine.direct(sink, stopTokens))
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

const TASKS = '/proc/self/task'

/**
 * CPU time of each thread of this process, and of others by id, in ns, by name. This thread's own
 * is what it was when it last began to run.
 */
export function cpuTimes(others: readonly number[]): Record<string, number> {
  const own = readdirSync(TASKS).map((task) => `${TASKS}/${task}`)
  return timesOf([...own, ...others.map((id) => `/proc/${id}`)])
}

/** The same, but what it takes to look is no part of what comes after. */
export async function cpuTimesBefore(others: readonly number[]): Promise<Record<string, number>> {
  const times = cpuTimes(others)
  await sleep(SETTLE_MS)
  return { ...times, ...timesOf([`${TASKS}/${process.pid}`]) }
}

function timesOf(folders: readonly string[]): Record<string, number> {
  const times: Record<string, number> = {}
  for (const folder of folders) {
    try {
      const name = readFileSync(`${folder}/comm`, 'utf8').trim()
      const ns = Number(readFileSync(`${folder}/schedstat`, 'utf8').split(' ')[0])
      times[name] = (times[name] ?? 0) + ns
    } catch {
      // It has ended.
    }
  }
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
