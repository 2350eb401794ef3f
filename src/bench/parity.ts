// Owns `lattice bench parity`: whether this engine says what node-llama-cpp says on the same file.
// Greedy tokens are compared prompt by prompt; where they part, the gap between the two best
// logits tells a tie from a fault. Distributions are compared position by position (KL, in nats).

import { readFileSync } from 'node:fs'
import { LatticeError } from '../errors.ts'
import { CpuBackend } from '../backends/cpu/backend.ts'
import { StepBatch } from '../backends/backend.ts'
import { allowedCpus } from '../ffi/libc.ts'
import { openModel } from '../model/load.ts'
import { computeCpus } from '../os/cpus.ts'
import { loadTokenizer } from '../text/load.ts'
import { Peer } from './cpu.ts'
import { PARITY_PROMPTS } from './parity-prompts.ts'

export interface ParityOptions {
  modelPath: string
  peerFolder: string
  threads: number
  outputTokens: number
  /** Positions at which distributions are compared. */
  positions: number
  onProgress(line: string): void
}

export interface ParityReport {
  prompts: number
  output_tokens: number
  identical: number
  /** Where a prompt's tokens first differ: the gap of our two best logits there. */
  differences: { prompt: number; position: number; gap: number }[]
  positions: number
  mean_kl: number
  max_kl: number
}

export async function runParity(options: ParityOptions): Promise<ParityReport> {
  const { threads, outputTokens } = options
  const model = openModel(options.modelPath)
  const tokenizer = loadTokenizer(model)
  const text = Array.from(
    tokenizer.encode(longText(), { addSpecial: true, parseSpecial: false }),
  ).slice(0, options.positions)
  if (text.length < options.positions) {
    throw new LatticeError('usage', `The text has ${text.length} positions.`, {
      todo: `Give --positions ${text.length} or fewer.`,
    })
  }
  const prompts = PARITY_PROMPTS.map((prompt) =>
    Array.from(tokenizer.encode(prompt, { addSpecial: true, parseSpecial: false })),
  )
  const longest = Math.max(...prompts.map((prompt) => prompt.length)) + outputTokens
  const contextLength = Math.max(longest, text.length) + 8
  const peer = await Peer.start(options, contextLength, 1)
  const backend = new CpuBackend(model, {
    contextLength,
    maxSequences: 1,
    stepTokens: 512,
    cpus: computeCpus(allowedCpus(), threads),
  })
  const batch = new StepBatch(512, 1)
  const step = (tokens: readonly number[], from: number, count: number): Float32Array => {
    batch.clear()
    batch.add(0, from, tokens, from, count, true)
    backend.launch(batch)
    return backend.collect()[0] ?? new Float32Array(0)
  }

  const differences: ParityReport['differences'] = []
  for (const [index, prompt] of prompts.entries()) {
    const { tokens: theirs } = await peer.run({ kind: 'decode', prompt, count: outputTokens })
    const expected = theirs[0] ?? []
    const tokens = [...prompt]
    let row = step(tokens, 0, prompt.length)
    for (let i = 0; i < expected.length; i++) {
      const [best, gap] = topGap(row)
      if (best !== expected[i]) {
        differences.push({ prompt: index, position: i, gap })
        break
      }
      tokens.push(best)
      if (i + 1 < expected.length) row = step(tokens, tokens.length - 1, 1)
    }
    backend.kv.release(0)
    if ((index + 1) % 10 === 0) options.onProgress(`${index + 1} of ${prompts.length} prompts`)
  }

  let [sum, max] = [0, 0]
  // One position at a time on both sides, as decoding goes: ggml's attention for long runs of
  // queries sums in float32 and for few in float16, and the two are 2e-3 nats apart by themselves.
  for (let i = 0; i < text.length; i++) {
    const job = { kind: 'probabilities' as const, tokens: text.slice(i, i + 1), fresh: i === 0 }
    const kl = divergence(step(text, i, 1), (await peer.run(job)).probabilities[0] ?? [])
    sum += kl
    max = Math.max(max, kl)
    if ((i + 1) % 500 === 0) options.onProgress(`${i + 1} of ${text.length} positions`)
  }
  peer.stop()
  backend.close()
  return {
    prompts: prompts.length,
    output_tokens: outputTokens,
    identical: prompts.length - differences.length,
    differences,
    positions: text.length,
    mean_kl: sum / text.length,
    max_kl: max,
  }
}

/** Prose with tables and code: this project's own documents. */
function longText(): string {
  const documents = ['ARCHITECTURE.md', 'docs/errors.md', 'docs/api.md', 'docs/cli.md']
  return documents
    .map((name) => readFileSync(new URL(`../../${name}`, import.meta.url), 'utf8'))
    .join('\n')
}

function topGap(row: Float32Array): [token: number, gap: number] {
  let [best, first, second] = [0, -Infinity, -Infinity]
  for (let i = 0; i < row.length; i++) {
    const value = row[i] ?? -Infinity
    if (value > first) [best, first, second] = [i, value, first]
    else if (value > second) second = value
  }
  return [best, first - second]
}

/**
 * KL(theirs ‖ ours) in nats, from their probabilities and our logits. Theirs are divided by their
 * sum: as they come, they add up to 1.00015.
 */
function divergence(row: Float32Array, theirs: readonly [number, number][]): number {
  let max = -Infinity
  for (const value of row) max = Math.max(max, value)
  let total = 0
  for (const value of row) total += Math.exp(value - max)
  const norm = max + Math.log(total)
  const mass = theirs.reduce((sum, [, p]) => sum + p, 0)
  let kl = 0
  for (const [token, raw] of theirs) {
    const p = raw / mass
    if (p > 0) kl += p * (Math.log(p) - ((row[token] ?? -Infinity) - norm))
  }
  return kl
}
