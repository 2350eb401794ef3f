// Owns what the GPU remembers of each slot's sampling: parameters, biases, token counts, the
// generator's counter. It is written when a sequence takes a slot and kept up by sample.cu.

import { LatticeError } from '../../errors.ts'
import type { SamplingParams } from '../../engine/api.ts'
import type { CudaDriver } from '../../ffi/cuda.ts'
import { KernelLaunch } from '../../ffi/kernel-launch.ts'
import { viewMemory } from '../../ffi/libc.ts'
import type { SlotSampling } from '../backend.ts'
import type { KernelFinder } from './kernels.ts'

/** Of struct Sampling in sample.cuh. */
const PARAMS_BYTES = 96

/** Tokens that one sequence may bias; as sample.cu has it. */
export const BIASES_MAX = 1024

export class SamplingTable {
  readonly table: number
  readonly biasTokens: number
  readonly biases: number
  readonly counts: number
  private readonly driver: CudaDriver
  private readonly vocab: number
  private readonly device: number
  private readonly host: number
  /** By slot: which of its two parts of `host` was written last. */
  private readonly turns: Uint8Array
  private readonly markSeen: KernelLaunch

  constructor(
    driver: CudaDriver,
    kernel: KernelFinder,
    slots: number,
    vocab: number,
    stream: number,
  ) {
    this.driver = driver
    this.vocab = vocab
    const biasBytes = slots * BIASES_MAX * 4
    const bytes = slots * PARAMS_BYTES + 2 * biasBytes + slots * vocab * 2
    this.device = driver.allocate(bytes)
    driver.fill8(this.device, 0, bytes, stream)
    driver.synchronizeStream(stream)
    this.table = this.device
    this.biasTokens = this.table + slots * PARAMS_BYTES
    this.biases = this.biasTokens + biasBytes
    this.counts = this.biases + biasBytes
    // Two for each slot: one may still be copied when the slot's next sequence begins.
    this.host = driver.allocateHost(2 * slots * (PARAMS_BYTES + BIASES_MAX * 8))
    this.turns = new Uint8Array(slots)
    this.markSeen = new KernelLaunch(kernel('step.cu', 'markSeen', {}), ['u64', 'u64', 'i32'])
    this.markSeen.grid(16).threads(256)
  }

  /** Whether biases are of known tokens, and no more than there is room for. */
  takes({ logitBias }: SamplingParams): boolean {
    const known = logitBias.every(([token]) => token < this.vocab)
    return known && logitBias.length <= BIASES_MAX
  }

  /**
   * Queues the beginning of a sequence in a slot.
   * @throws LatticeError `invalid_request` for biases of unknown tokens, or too many
   */
  begin(slot: number, { params, prompt, output, topLogprobs }: SlotSampling, stream: number): void {
    const bias = new Map<number, number>()
    for (const [token, value] of params.logitBias) bias.set(token, (bias.get(token) ?? 0) + value)
    this.checkBiases([...bias.keys()])
    const turn = (this.turns[slot] ?? 0) ^ 1
    this.turns[slot] = turn
    const place = this.host + (2 * slot + turn) * (PARAMS_BYTES + BIASES_MAX * 8)
    const view = new DataView(viewMemory(place, PARAMS_BYTES + BIASES_MAX * 8))
    const { repetitionPenalty, presencePenalty, frequencyPenalty, seed } = params
    const penalised = repetitionPenalty !== 1 || presencePenalty !== 0 || frequencyPenalty !== 0
    const doubles = [params.temperature, params.topP, params.minP, params.typicalP]
    doubles.push(repetitionPenalty, presencePenalty, frequencyPenalty)
    doubles.forEach((value, i) => view.setFloat64(i * 8, value, true))
    view.setInt32(56, params.topK, true)
    view.setInt32(60, bias.size, true)
    view.setUint32(64, seed >>> 0, true)
    view.setUint32(68, Math.floor(seed / 2 ** 32) >>> 0, true)
    view.setBigUint64(72, BigInt(output.length), true)
    view.setInt32(80, penalised ? 1 : 0, true)
    view.setInt32(84, topLogprobs ?? -1, true)
    this.driver.copyToDevice(this.table + slot * PARAMS_BYTES, place, PARAMS_BYTES, stream)
    if (bias.size > 0) this.copyBiases(slot, bias, place + PARAMS_BYTES, view, stream)
    if (penalised) {
      const seen = repetitionPenalty === 1 ? new Int32Array() : prompt
      this.count(slot, seen, output, stream)
    }
  }

  close(): void {
    this.driver.free(this.device)
    this.driver.freeHost(this.host)
  }

  private copyBiases(
    slot: number,
    bias: ReadonlyMap<number, number>,
    place: number,
    view: DataView,
    stream: number,
  ): void {
    let i = 0
    for (const [token, value] of bias) {
      view.setInt32(PARAMS_BYTES + i * 4, token, true)
      view.setFloat32(PARAMS_BYTES + (BIASES_MAX + i) * 4, value, true)
      i++
    }
    const at = slot * BIASES_MAX * 4
    this.driver.copyToDevice(this.biasTokens + at, place, i * 4, stream)
    this.driver.copyToDevice(this.biases + at, place + BIASES_MAX * 4, i * 4, stream)
  }

  /** Rare, so it may wait: the tokens go through memory of their own. */
  private count(slot: number, prompt: Int32Array, output: Int32Array, stream: number): void {
    const { driver, vocab } = this
    const row = this.counts + slot * vocab * 2
    driver.fill16(row, 0, vocab, stream)
    if (prompt.length + output.length === 0) return
    const staging = driver.allocateHost(Math.max(prompt.length * 4, vocab * 2))
    if (output.length > 0) {
      const counts = new Uint16Array(viewMemory(staging, vocab * 2)).fill(0)
      for (const token of prompt) counts[token] = SEEN
      for (const token of output) {
        counts[token] = SEEN | Math.min(((counts[token] ?? 0) & ~SEEN) + 1, SEEN - 1)
      }
      driver.copyToDevice(row, staging, vocab * 2, stream)
    } else {
      new Int32Array(viewMemory(staging, prompt.length * 4)).set(prompt)
      driver.launch(this.markSeen.setAll(row, staging, prompt.length), stream)
    }
    driver.synchronizeStream(stream)
    driver.freeHost(staging)
  }

  private checkBiases(tokens: readonly number[]): void {
    const unknown = tokens.find((token) => token >= this.vocab)
    if (unknown === undefined && tokens.length <= BIASES_MAX) return
    const what =
      unknown === undefined
        ? `names ${tokens.length} tokens; a GPU takes ${BIASES_MAX}`
        : `names token ${unknown}, but the model has only ${this.vocab} tokens`
    throw new LatticeError('invalid_request', `logit_bias ${what}.`, {
      todo: 'Leave tokens out of logit_bias.',
      details: { param: 'logit_bias' },
    })
  }
}

/** Of a count: the token has come up. */
const SEEN = 0x8000
