// Owns generating more samples of a prompt than are asked for and keeping the best: those with the
// highest log-probability a token, as OpenAI's API defines `best_of`.

import { present } from '../assert.ts'
import type { Tokenizer } from '../text/tokenizer.ts'
import type { Engine } from './api.ts'
import {
  type DeltaToken,
  generate,
  type Generation,
  type GenerationEvent,
  type GenerationRequest,
} from './generation.ts'

type Finish = GenerationEvent & { kind: 'finish' }

interface Sample {
  text: string
  tokens: DeltaToken[]
  finish: Finish | undefined
}

/**
 * As `generate`, but of `bestOf` samples the best `request.choices` are told, when all have ended;
 * choice 0 is the best, and of equals the one with the lower seed is the better.
 */
export function generateBest(
  engine: Engine,
  tokenizer: Tokenizer,
  request: GenerationRequest,
  bestOf: number,
): Generation {
  const topLogprobs = request.topLogprobs ?? 0
  const inner = generate(engine, tokenizer, { ...request, choices: bestOf, topLogprobs })
  const samples = Array.from({ length: bestOf }, (): Sample => {
    return { text: '', tokens: [], finish: undefined }
  })
  let discardedTokens = 0

  async function* events(): AsyncGenerator<GenerationEvent> {
    for await (const event of inner.events) {
      const sample = present(samples[event.choice], 'a sample')
      if (event.kind === 'finish') {
        sample.finish = event
        // Without one of the samples there is no best one.
        if (event.reason === 'error') inner.abort()
      } else {
        sample.text += event.text
        sample.tokens.push(...event.tokens)
      }
    }
    samples.sort((a, b) => rankOf(b) - rankOf(a))
    for (const { finish } of samples.splice(request.choices)) {
      discardedTokens += finish?.outputTokens ?? 0
    }
    for (const [choice, { text, tokens, finish }] of samples.entries()) {
      const shown =
        request.topLogprobs === undefined
          ? tokens.map(({ token }) => ({ token, logprobs: undefined }))
          : tokens
      if (shown.length > 0) yield { kind: 'delta', choice, text, tokens: shown }
      yield { ...present(finish, 'a finish'), choice }
    }
  }

  return {
    events: events(),
    abort: () => inner.abort(),
    get discardedTokens() {
      return discardedTokens
    },
  }
}

/** An error comes first, so that it is told; a sample without tokens last. */
function rankOf({ finish }: Sample): number {
  if (finish?.reason === 'error') return Infinity
  return finish?.score ?? -Infinity
}
