// Owns a stand-in for the engine's generate(): the same contract, written the short way.

import type { Engine, SequenceHandle } from '../../src/engine/api.ts'
import type { Generation, GenerationEvent, GenerationRequest } from '../../src/engine/generation.ts'
import type { Tokenizer } from '../../src/text/tokenizer.ts'

export function generate(
  engine: Engine,
  tokenizer: Tokenizer,
  request: GenerationRequest,
): Generation {
  const queue: GenerationEvent[] = []
  const handles: SequenceHandle[] = []
  let open = request.choices
  let wake: (() => void) | undefined
  const emit = (event: GenerationEvent): void => {
    queue.push(event)
    wake?.()
  }
  const abort = (): void => {
    for (const handle of handles) handle.abort()
  }
  try {
    for (let choice = 0; choice < request.choices; choice++) handles.push(start(choice))
  } catch (error) {
    abort()
    throw error
  }
  return { events: events(), abort }

  function start(choice: number): SequenceHandle {
    const text = tokenizer.detokenizer({ skipSpecial: true })
    let held = ''
    let matched: string | undefined
    const handle = engine.submit(
      {
        requestId: request.requestId,
        tenant: request.tenant,
        prompt: request.prompt,
        sampling: { ...request.sampling, seed: request.sampling.seed + choice },
        maxTokens: request.maxTokens,
        stopTokens: request.ignoreEos ? [] : tokenizer.eosTokens,
        topLogprobs: request.topLogprobs,
      },
      {
        onToken(token, logprobs) {
          if (matched !== undefined) return
          held += text.push(token)
          matched = request.stop.find((stop) => held.includes(stop))
          if (matched !== undefined) {
            held = held.slice(0, held.indexOf(matched))
            handle.abort()
          }
          const safe = matched === undefined ? held.length - possibleStop(held) : held.length
          const tokens = [{ token, logprobs }]
          emit({ kind: 'delta', choice, text: held.slice(0, safe), tokens })
          held = held.slice(safe)
        },
        onFinish(reason, outputTokens, error) {
          const rest = matched === undefined ? held + text.end() : ''
          if (rest !== '') emit({ kind: 'delta', choice, text: rest, tokens: [] })
          const finished = matched === undefined ? reason : 'stop'
          open--
          emit({ kind: 'finish', choice, reason: finished, matched, outputTokens, error })
        },
      },
    )
    return handle
  }

  function possibleStop(tail: string): number {
    let longest = 0
    for (const stop of request.stop) {
      for (let n = 1; n < stop.length; n++)
        if (tail.endsWith(stop.slice(0, n))) longest = Math.max(longest, n)
    }
    return longest
  }

  async function* events(): AsyncGenerator<GenerationEvent> {
    try {
      while (open > 0 || queue.length > 0) {
        while (queue.length > 0) yield queue.shift()!
        if (open > 0) await new Promise<void>((resolve) => (wake = resolve))
      }
    } finally {
      if (open > 0) abort()
    }
  }
}
