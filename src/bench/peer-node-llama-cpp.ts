// Owns the other side of `lattice bench cpu`: a process of its own that runs node-llama-cpp on the
// same file and answers jobs over IPC, so that neither side's threads or heap touch the other's.
//
// argv: MODEL THREADS PEER_DIR CONTEXT SEQUENCES. Jobs and results: see `PeerJob` and `PeerResult`.

import { createRequire } from 'node:module'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'

export type PeerJob =
  /** Evaluates the tokens on an empty sequence. */
  | { kind: 'prefill'; tokens: number[] }
  /** Greedy tokens after a prompt, timed from the first to the last. */
  | { kind: 'decode'; prompt: number[]; count: number }
  /** The same on several sequences at once. */
  | { kind: 'batch'; prompts: number[][]; count: number }
  /** Next-token probabilities after every token of a text; `fresh` starts a new one. */
  | { kind: 'probabilities'; tokens: number[]; fresh: boolean }

export interface PeerResult {
  ms: number
  /** From the job's start until every sequence has its first token. */
  firstMs: number
  tokens: number[][]
  /** For each position: [token, probability] pairs, without what is below `NEGLIGIBLE`. */
  probabilities: [number, number][][]
}

/** 50,000 tokens of less than this change a sum of p log p/q by less than 1e-5. */
const NEGLIGIBLE = 1e-10

interface PeerSequence {
  clearHistory(): Promise<void>
  evaluateWithoutGeneratingNewTokens(tokens: number[]): Promise<void>
  evaluate(tokens: number[], options: object): AsyncIterable<number>
  controlledEvaluate(
    input: (number | [number, object])[],
  ): Promise<({ next?: { probabilities?: Map<number, number> } } | undefined)[]>
}

async function main(): Promise<void> {
  const [model = '', threads = '2', folder = '', context = '2048', sequences = '1'] =
    process.argv.slice(2)
  const entry = createRequire(join(folder, 'x.js')).resolve('node-llama-cpp')
  const peer = (await import(pathToFileURL(entry).href)) as {
    getLlama(options: object): Promise<{
      loadModel(options: object): Promise<{
        createContext(options: object): Promise<{ getSequence(): PeerSequence }>
      }>
    }>
  }
  const llama = await peer.getLlama({
    gpu: false,
    build: 'never',
    progressLogs: false,
    maxThreads: Number(threads),
    logLevel: 'error',
  })
  const loaded = await llama.loadModel({ modelPath: model })
  const count = Number(sequences)
  const ctx = await loaded.createContext({
    sequences: count,
    contextSize: Number(context),
    batchSize: 512,
    threads: { ideal: Number(threads), min: Number(threads) },
    flashAttention: process.env['PEER_FLASH'] !== '0',
    batching: { itemPrioritizationStrategy: 'maximumParallelism' },
  })
  const all = Array.from({ length: count }, () => ctx.getSequence())
  const first = all[0]
  if (!first) throw new Error('no sequence')

  const greedy = async (
    sequence: PeerSequence,
    prompt: number[],
    limit: number,
  ): Promise<{ tokens: number[]; first: number; last: number }> => {
    await sequence.clearHistory()
    const tokens: number[] = []
    let [start, last] = [0, 0]
    for await (const token of sequence.evaluate(prompt, {
      temperature: 0,
      yieldEogToken: true,
    })) {
      last = performance.now()
      if (tokens.length === 0) start = last
      if (tokens.push(token) >= limit) break
    }
    return { tokens, first: start, last }
  }

  const run = async (job: PeerJob): Promise<PeerResult> => {
    const begin = performance.now()
    const result: PeerResult = { ms: 0, firstMs: 0, tokens: [], probabilities: [] }
    if (job.kind === 'prefill') {
      await first.clearHistory()
      const start = performance.now()
      await first.evaluateWithoutGeneratingNewTokens(job.tokens)
      result.ms = performance.now() - start
    } else if (job.kind === 'probabilities') {
      if (job.fresh) await first.clearHistory()
      const wanted = job.tokens.map((token): [number, object] => [
        token,
        { generateNext: { probabilities: true } },
      ])
      for (const item of await first.controlledEvaluate(wanted)) {
        const all = [...(item?.next?.probabilities ?? [])]
        result.probabilities.push(all.filter(([, probability]) => probability > NEGLIGIBLE))
      }
    } else {
      const prompts = job.kind === 'decode' ? [job.prompt] : job.prompts
      const done = await Promise.all(
        prompts.map((prompt, i) => greedy(all[i] ?? first, prompt, job.count)),
      )
      // From when everyone has a first token to when the last one ends: decoding alone.
      const start = Math.max(...done.map((one) => one.first))
      result.ms = Math.max(...done.map((one) => one.last)) - start
      result.firstMs = start - begin
      result.tokens = done.map((one) => one.tokens)
    }
    return result
  }

  process.on('message', (job: PeerJob) => {
    void run(job).then(
      (result) => process.send?.({ result }),
      (error: unknown) => process.send?.({ error: String(error) }),
    )
  })
  process.on('disconnect', () => process.exit(0))
  process.send?.({ ready: true })
}

await main()
