// Owns the arrival of requests: prompts that begin alike, choices in groups, every way of sampling.

import { GREEDY, type SamplingParams, type SequenceRequest } from '../../../src/engine/api.ts'
import type { Random } from '../../support/random.ts'
import type { World } from '../world.ts'
import type { Action, Operation } from './operation.ts'

export const submit: Operation = {
  name: 'submit',
  rate: 0.15,
  draw(world, random): Action | undefined {
    const { sequencesMax } = world.config
    const choices = random.chance(0.6) ? 1 : random.between(2, 5)
    if (world.expected.size + choices > Math.max(choices, sequencesMax)) return undefined
    const request = drawRequest(world, random)
    const first = world.nextId(choices)
    const ids = choices === 1 ? `${first}` : `${first}…${first + choices - 1}`
    const { prompt, tenant, maxTokens, sampling } = request
    return {
      describe: () =>
        `submit ${ids} for ${tenant}: ` +
        `[${prompt.join(' ')}] + ${maxTokens}, temperature ${sampling.temperature}`,
      run: (world) => world.submit(first, request, choices),
    }
  },
}

export function drawRequest(world: World, random: Random): SequenceRequest {
  const { vocab, layout, tenants } = world.config
  const { maxTokens } = layout.shape
  const prompt = drawPrompt(world, random).slice(0, maxTokens - 1)
  const room = maxTokens - prompt.length
  return {
    requestId: 'drawn',
    tenant: `tenant ${random.below(tenants)}`,
    prompt: Int32Array.from(prompt),
    sampling: drawSampling(random, vocab),
    maxTokens: Math.min(room, random.chance(0.5) ? random.between(1, 4) : random.between(1, room)),
    stopTokens: random.chance(0.3) ? [random.below(vocab), random.below(vocab)] : [],
    topLogprobs: random.chance(0.1) ? random.below(3) : undefined,
  }
}

function drawPrompt(world: World, random: Random): number[] {
  const { words, vocab } = world.config
  const prompt: number[] = []
  for (let left = random.between(1, 5); left > 0; left--) prompt.push(...random.pick(words))
  if (random.chance(0.3)) prompt.length = random.between(1, prompt.length)
  if (random.chance(0.2)) prompt[random.below(prompt.length)] = random.below(vocab)
  return prompt
}

function drawSampling(random: Random, vocab: number): SamplingParams {
  const seed = random.below(2 ** 31)
  if (random.chance(0.4)) return { ...GREEDY, seed }
  const plain = { ...GREEDY, temperature: random.pick([0.5, 1, 1.5]), seed }
  if (random.chance(0.7)) return plain
  return {
    ...plain,
    topK: random.pick([0, 3]),
    topP: random.pick([1, 0.8]),
    minP: random.pick([0, 0.1]),
    repetitionPenalty: random.pick([1, 1.2]),
    presencePenalty: random.pick([0, 0.5]),
    frequencyPenalty: random.pick([0, 0.3]),
    logitBias: random.chance(0.3) ? [[random.below(vocab), 2]] : [],
  }
}
