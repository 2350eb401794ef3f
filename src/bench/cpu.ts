// Owns `lattice bench cpu`: this engine against node-llama-cpp on the same file, threads and
// tokens, taking turns in one run, so that a noisy machine is noisy to both.

import { fork } from 'node:child_process'
import { setTimeout as sleep } from 'node:timers/promises'
import { LatticeError } from '../errors.ts'
import { GREEDY, type Engine } from '../engine/api.ts'
import { startEngine } from '../engine/start.ts'
import type { PeerJob, PeerResult } from './peer-node-llama-cpp.ts'

export interface CpuBenchOptions {
  modelPath: string
  /** Folder in which the package node-llama-cpp is installed. */
  peerFolder: string
  threads: number
  rounds: number
  streams: number
  promptTokens: number
  outputTokens: number
  onProgress(line: string): void
}

export interface CpuBenchRow {
  name: 'prefill' | 'ttft' | 'decode' | 'batch'
  /** Tokens a second, median over rounds. */
  lattice_tokens_per_s: number
  peer_tokens_per_s: number
  /** Median of the ratios of the rounds' pairs; above 1, Lattice is faster. */
  ratio: number
  ratio_min: number
  ratio_max: number
}

export interface CpuBenchReport {
  model: string
  threads: number
  rounds: number
  prompt_tokens: number
  output_tokens: number
  streams: number
  rows: CpuBenchRow[]
  /** Share of step time outside the library's compute at `streams` sequences, in percent. */
  overhead_percent: number
}

/**
 * llama.cpp's compute threads spin for about half a second after their last graph, on the cores
 * that the next measurement needs. Ours spin for 10 ms. Nobody is measured beside the other's.
 */
const SETTLE_MS = 1000

/** A prompt of ordinary token ids, the same for both sides, different for each stream. */
export function benchPrompt(length: number, stream: number): number[] {
  // Ids below 300 may be special in some vocabularies; every one here has more than 30,000.
  return Array.from({ length }, (_, i) => 300 + ((i * 7919 + stream * 104_729) % 29_000))
}

export class Peer {
  private readonly child: ReturnType<typeof fork>

  private constructor(child: ReturnType<typeof fork>) {
    this.child = child
  }

  /** @throws LatticeError `backend_unavailable` if node-llama-cpp does not start. */
  static async start(
    options: { modelPath: string; peerFolder: string; threads: number },
    context: number,
    sequences: number,
    env: Record<string, string> = {},
  ): Promise<Peer> {
    const { modelPath, peerFolder, threads } = options
    const script = new URL('./peer-node-llama-cpp.ts', import.meta.url)
    const argv = [modelPath, String(threads), peerFolder, String(context), String(sequences)]
    const child = fork(script, argv, {
      serialization: 'advanced',
      stdio: ['ignore', 'ignore', 'pipe', 'ipc'],
      env: { ...process.env, ...env },
    })
    let said = ''
    child.stderr?.on('data', (chunk: Buffer) => {
      said = (said + chunk.toString()).slice(-2000)
    })
    const peer = new Peer(child)
    try {
      await peer.answer()
    } catch (cause) {
      throw new LatticeError('backend_unavailable', `node-llama-cpp did not start: ${said}`, {
        todo: `Install it: npm install --prefix ${peerFolder} node-llama-cpp`,
        cause,
      })
    }
    return peer
  }

  /** @param settleMs how long to wait after the answer, until its threads are asleep. */
  async run(job: PeerJob, settleMs = 0): Promise<PeerResult> {
    const answer = this.answer()
    this.child.send(job)
    const result = await answer
    await sleep(settleMs)
    return result
  }

  stop(): void {
    this.child.disconnect()
    this.child.kill()
  }

  private answer(): Promise<PeerResult> {
    return new Promise((resolve, reject) => {
      const onExit = (): void => reject(new Error('the peer process ended'))
      this.child.once('exit', onExit)
      this.child.once('message', (message: { error?: string; result?: PeerResult }) => {
        this.child.off('exit', onExit)
        if (message.error === undefined) resolve(message.result as PeerResult)
        else reject(new Error(message.error))
      })
    })
  }
}

/** Runs sequences together; `ms` is from when all have a first token to when the last one ends. */
export async function generateTokens(
  engine: Engine,
  prompts: readonly number[][],
  count: number,
): Promise<{ ms: number; firstMs: number; tokens: number[][] }> {
  const start = performance.now()
  const done = prompts.map(
    (prompt) =>
      new Promise<{ first: number; last: number; tokens: number[] }>((resolve, reject) => {
        const tokens: number[] = []
        let [first, last] = [0, 0]
        const request = {
          requestId: 'bench',
          tenant: 'bench',
          prompt: Int32Array.from(prompt),
          sampling: GREEDY,
          maxTokens: count,
          stopTokens: [],
          topLogprobs: undefined,
        }
        engine.submit(request, {
          onToken(token) {
            last = performance.now()
            if (tokens.length === 0) first = last
            tokens.push(token)
          },
          onFinish: (_reason, _count, error) =>
            error ? reject(error) : resolve({ first, last, tokens }),
        })
      }),
  )
  const ended = await Promise.all(done)
  const first = Math.max(...ended.map((one) => one.first))
  const last = Math.max(...ended.map((one) => one.last))
  return { ms: last - first, firstMs: first - start, tokens: ended.map((one) => one.tokens) }
}

export async function runCpuBench(options: CpuBenchOptions): Promise<CpuBenchReport> {
  const { threads, rounds, streams, promptTokens, outputTokens } = options
  const context = promptTokens + outputTokens + 8
  const { engine } = await startEngine(options.modelPath, {
    modelId: 'bench',
    device: 'cpu',
    threads,
    maxSequences: Math.max(streams, 16),
  })
  const single = await Peer.start(options, context, 1)
  const many = await Peer.start(options, context * streams, streams)
  const prompt = benchPrompt(promptTokens, 0)
  const short = Math.min(promptTokens, 128)
  const prompts = Array.from({ length: streams }, (_, i) => benchPrompt(short, i + 1))
  const pairs: Record<CpuBenchRow['name'], { ours: number; theirs: number }[]> = {
    prefill: [],
    ttft: [],
    decode: [],
    batch: [],
  }
  let overhead = { compute: 0, step: 0 }

  for (let round = -1; round < rounds; round++) {
    const prefill = {
      ours: (await generateTokens(engine, [prompt], 1)).firstMs,
      theirs: (await single.run({ kind: 'prefill', tokens: prompt }, SETTLE_MS)).ms,
    }
    const ttft = {
      ours: (await generateTokens(engine, [prompt], 1)).firstMs,
      theirs: (await single.run({ kind: 'decode', prompt, count: 1 }, SETTLE_MS)).firstMs,
    }
    const decodePrompt = prompt.slice(0, short)
    const count = outputTokens
    const decode = {
      ours: (await generateTokens(engine, [decodePrompt], count)).ms,
      theirs: (await single.run({ kind: 'decode', prompt: decodePrompt, count }, SETTLE_MS)).ms,
    }
    const before = await engine.snapshot()
    const ours = (await generateTokens(engine, prompts, count)).ms
    const after = await engine.snapshot()
    const batch = {
      ours,
      theirs: (await many.run({ kind: 'batch', prompts, count }, SETTLE_MS)).ms,
    }
    // The first round warms up both sides.
    if (round < 0) continue
    overhead = {
      compute: overhead.compute + after.computeMs - before.computeMs,
      step: overhead.step + after.stepMs - before.stepMs,
    }
    pairs.prefill.push(prefill)
    pairs.ttft.push(ttft)
    pairs.decode.push(decode)
    pairs.batch.push(batch)
    options.onProgress(
      `round ${round + 1} of ${rounds}: ` +
        Object.entries({ prefill, ttft, decode, batch })
          .map(([name, pair]) => `${name} ${(pair.theirs / pair.ours).toFixed(2)}x`)
          .join(', '),
    )
  }
  single.stop()
  many.stop()
  await engine.close()
  const tokens = {
    prefill: promptTokens,
    ttft: promptTokens,
    decode: outputTokens - 1,
    batch: (outputTokens - 1) * streams,
  }
  return {
    model: options.modelPath,
    threads,
    rounds,
    prompt_tokens: promptTokens,
    output_tokens: outputTokens,
    streams,
    rows: (['prefill', 'ttft', 'decode', 'batch'] as const).map((name) =>
      summarise(name, pairs[name], tokens[name]),
    ),
    overhead_percent: 100 * (1 - overhead.compute / overhead.step),
  }
}

function summarise(
  name: CpuBenchRow['name'],
  pairs: readonly { ours: number; theirs: number }[],
  tokens: number,
): CpuBenchRow {
  const ratios = pairs.map((pair) => pair.theirs / pair.ours)
  return {
    name,
    lattice_tokens_per_s: (tokens * 1000) / median(pairs.map((pair) => pair.ours)),
    peer_tokens_per_s: (tokens * 1000) / median(pairs.map((pair) => pair.theirs)),
    ratio: median(ratios),
    ratio_min: Math.min(...ratios),
    ratio_max: Math.max(...ratios),
  }
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b)
  const middle = sorted.length >> 1
  const upper = sorted[middle] ?? Number.NaN
  return sorted.length % 2 === 1 ? upper : (upper + (sorted[middle - 1] ?? upper)) / 2
}
