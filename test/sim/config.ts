// Owns what a seed decides before the first step: the sizes of everything, the words that prompts
// are made of, and how often each kind of thing happens. Small numbers, so that borders are met
// often; some kinds of things are left out of a run altogether, so that others come to their own.

import type { Watermarks } from '../../src/engine/offload.ts'
import { EVICTION_NAMES, type EvictionName } from '../../src/kv/eviction.ts'
import { columnsFor, regionsFor } from '../../src/kv/regions.ts'
import { type KvLayout, layerMajor, pagesFor, tokenMajor } from '../../src/kv/layout.ts'
import { stepTokensNeeded } from '../../src/scheduler/scheduler.ts'
import type { Random } from '../support/random.ts'
import type { Operation } from './operations/operation.ts'

export interface SimConfig {
  vocab: number
  layout: KvLayout
  slots: number
  regions: number
  maxSequences: number
  kvPages: number
  prefixPages: number
  prefixEviction: EvictionName
  /** Answers are cached, too. */
  prefixOutput: boolean
  /** Columns that a disk has room for; 0 is no disk. */
  tierColumns: number
  /** Lets in whoever fits, whatever others will need. */
  greedy: boolean
  comeBack: 'moved' | 'computed' | undefined
  watermarks: Watermarks
  stepTokens: number
  chunkTokensMin: number
  /** Other regions that a slot's tokens may lie in, at most. */
  spansMax: number
  tenants: number
  /** Prompts begin with some of these, so that they begin alike. */
  words: readonly (readonly number[])[]
  /** Sequences that are in the engine at once, at most. */
  sequencesMax: number
  /** How often an operation comes in a step, by its name; 0 is never. */
  rates: ReadonlyMap<string, number>
  /** Its memory is a GPU's, too. */
  gpu: boolean
  /** The backend chooses tokens, and steps are queued before the last one's are known. */
  ahead: boolean
  /** Another process takes memory, and gives it back. */
  contended: boolean
}

export function drawConfig(random: Random, operations: readonly Operation[]): SimConfig {
  const vocab = random.between(6, 24)
  const gpu = random.chance(0.4)
  const layout = drawLayout(random, gpu)
  const slots = random.between(1, 6)
  const maxSequences = random.chance(0.8) ? slots : random.between(1, slots)
  const chunkTokensMin = random.chance(0.7) ? 1 : random.between(2, 7)
  // One sequence of full length must fit; much more than all need teaches nothing.
  const alone = pagesFor(layout, layout.shape.maxTokens)
  const spare = (alone / layout.ranges) * random.pick([0.2, 0.5, 1, slots])
  const kvPages = alone + layout.ranges * random.below(Math.ceil(spare))
  const rates = new Map(
    operations.map(({ name, rate }) => [name, rate * random.pick([0, 0.3, 1, 1, 1, 3])]),
  )
  return {
    vocab,
    layout,
    gpu,
    slots,
    maxSequences,
    regions: random.chance(0.5) ? regionsFor(slots) : random.between(slots, 2 * slots + 8),
    kvPages,
    prefixPages: random.chance(0.2) ? 0 : random.between(1, random.chance(0.5) ? alone : kvPages),
    tierColumns: random.chance(0.4) ? 0 : random.between(1, (3 * kvPages) / layout.ranges),
    greedy: random.chance(0.5),
    watermarks: random.pick([
      { high: 0.9, low: 0.8 },
      { high: 0.6, low: 0.2 },
      { high: 1, low: 1 },
    ]),
    comeBack: random.pick([undefined, 'moved', 'moved', 'computed']),
    prefixEviction: random.pick(EVICTION_NAMES),
    prefixOutput: random.chance(0.3),
    stepTokens: stepTokensNeeded(maxSequences, chunkTokensMin) + random.below(24),
    chunkTokensMin,
    spansMax: random.chance(0.5) ? 1000 : random.between(1, 4),
    tenants: random.between(1, 3),
    words: Array.from({ length: random.between(2, 8) }, () =>
      Array.from({ length: random.between(1, 9) }, () => random.below(vocab)),
    ),
    sequencesMax: random.between(2, 4 * slots),
    rates,
    ahead: random.chance(0.5),
    contended: random.chance(0.5) && (rates.get('give back') ?? 0) > 0,
  }
}

/** Rows that fill a page evenly, that lie across pages, and that are longer than a page. */
function drawLayout(random: Random, gpu: boolean): KvLayout {
  const [rowBytes = 0, pageBytes = 0] = random.pick([
    [64, 256],
    [80, 256],
    [96, 256],
    [24, 256],
    [256, 256],
    [96, 64],
  ])
  const maxTokens = random.between(12, 72)
  const shape = { layers: random.between(1, 2), rowBytes, pageBytes, maxTokens }
  // There a column is one page, and pages are shared in groups.
  if (gpu) return tokenMajor({ ...shape, shareColumns: random.pick([1, 1, 2, 4]) })
  return random.chance(0.7) ? layerMajor(shape) : tokenMajor(shape)
}

export function describeConfig({
  layout,
  words,
  rates,
  watermarks,
  ...numbers
}: SimConfig): string[] {
  const { pageBytes, maxTokens } = layout.shape
  const never = [...rates].filter(([, rate]) => rate === 0).map(([name]) => name)
  return [
    Object.entries(numbers)
      .map(([name, value]) => `${name} ${value}`)
      .join(' · '),
    `${maxTokens} tokens of ${layout.ranges} × ${layout.tokenStride} bytes ` +
      `on pages of ${pageBytes}: ${columnsFor(layout, maxTokens)} columns · ` +
      `${words.length} words · watermarks ${watermarks.high} and ${watermarks.low}`,
    `never: ${never.join(', ') || '–'}`,
  ]
}
