// Owns the timing of one prompt's choices: it sees each generation event once and feeds the
// latency and length histograms from it.

import type { GenerationEvent } from '../engine/generation.ts'
import type { ServerMetrics } from './server-metrics.ts'

export class GenerationTimer {
  readonly #metrics: ServerMetrics
  readonly #arrivalMs: number
  /** When each choice delivered its first and its latest token; NaN before. */
  readonly #firstMs: Float64Array
  readonly #latestMs: Float64Array

  /** @param arrivalMs when the request arrived, on performance.now()'s clock. */
  constructor(metrics: ServerMetrics, arrivalMs: number, choices: number) {
    this.#metrics = metrics
    this.#arrivalMs = arrivalMs
    this.#firstMs = new Float64Array(choices).fill(NaN)
    this.#latestMs = new Float64Array(choices).fill(NaN)
  }

  see(event: GenerationEvent): void {
    const nowMs = performance.now()
    if (event.kind === 'finish') this.#finished(event, nowMs)
    else if (event.tokens.length > 0) this.#delivered(event.choice, event.tokens.length, nowMs)
  }

  /** Tokens held back by a stop string arrive together: their interval is shared evenly. */
  #delivered(choice: number, tokens: number, nowMs: number): void {
    const latestMs = this.#latestMs[choice]!
    if (Number.isNaN(latestMs)) {
      this.#firstMs[choice] = nowMs
      this.#metrics.timeToFirstToken.observe((nowMs - this.#arrivalMs) / 1000)
    } else {
      this.#metrics.interTokenLatency.observe((nowMs - latestMs) / 1000 / tokens, tokens)
    }
    this.#latestMs[choice] = nowMs
  }

  #finished(event: GenerationEvent & { kind: 'finish' }, nowMs: number): void {
    const metrics = this.#metrics
    metrics.requestSuccess.add(1, [event.reason])
    if (event.reason !== 'stop' && event.reason !== 'length') return
    metrics.requestLatency.observe((nowMs - this.#arrivalMs) / 1000)
    metrics.requestGenerationTokens.observe(event.outputTokens)
    const firstMs = this.#firstMs[event.choice]!
    if (event.outputTokens > 1 && !Number.isNaN(firstMs)) {
      metrics.timePerOutputToken.observe((nowMs - firstMs) / 1000 / (event.outputTokens - 1))
    }
  }
}
