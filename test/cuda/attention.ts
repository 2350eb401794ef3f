// Owns what attention on a GPU is compared with: KV in pages that are mapped where tokens are and
// nowhere else, and attention by its definition in float64.

import type { AttentionShape, StridedKv } from '../../src/backends/cuda/attention.ts'
import { addressOf } from '../../src/ffi/block.ts'
import { type Gpu, type Random, randomBf16, toBf16 } from './gpu.ts'

/** The layer that is attended to; the other one is full of NaN. */
export const LAYER = 1
const LAYERS = 2

export interface Slot {
  length: number
  /** [length, 2, kvHeads, headDim]: keys, then values. */
  kv: Float32Array
}

/**
 * Slots of random keys and values. Physical pages are mapped in random order, only as far as a
 * slot's tokens go, and hold NaN wherever no token of the layer is: reading elsewhere shows.
 */
export class MappedKv implements Disposable, StridedKv {
  readonly base: number
  readonly slotStride: number
  readonly tokenStride: number
  readonly slotTokens: number
  readonly slots: number
  readonly content: Slot[]
  private readonly gpu: Gpu
  private readonly pages: { address: number; handle: number }[] = []
  private readonly pageBytes: number

  constructor(gpu: Gpu, shape: AttentionShape, lengths: readonly number[], random: Random) {
    const { kvHeads, headDim } = shape
    const device = { kind: 'device', device: gpu.device.info.index } as const
    this.gpu = gpu
    this.pageBytes = gpu.driver.pageBytes(device)
    const layerElements = 2 * kvHeads * headDim
    this.tokenStride = LAYERS * layerElements * 2
    this.slotTokens = Math.max(...lengths) + 100
    this.slotStride =
      Math.ceil((this.slotTokens * this.tokenStride) / this.pageBytes) * this.pageBytes
    this.slots = lengths.length
    this.base = gpu.driver.reserve(this.slotStride * this.slots)
    const places = lengths.flatMap((length, slot) =>
      Array.from(
        { length: Math.ceil((length * this.tokenStride) / this.pageBytes) },
        (_, page) => this.base + slot * this.slotStride + page * this.pageBytes,
      ),
    )
    shuffle(places, random)
    for (const address of places) {
      const handle = gpu.driver.createPages(this.pageBytes, device)
      gpu.driver.map(address, this.pageBytes, handle)
      gpu.driver.allow(address, this.pageBytes, device.device)
      gpu.driver.fill16(address, 0xffff, this.pageBytes / 2, gpu.stream)
      this.pages.push({ address, handle })
    }
    this.content = lengths.map((length, slot) => {
      const kv = randomBf16(random, length * layerElements)
      this.write(slot, toBf16(kv), layerElements)
      return { length, kv }
    })
  }

  /** One slot's tokens of the layer, the other layer's NaN. */
  private write(slot: number, kv: Uint16Array, layerElements: number): void {
    const tokens = kv.length / layerElements
    const bits = new Uint16Array(tokens * LAYERS * layerElements).fill(0xffff)
    for (let t = 0; t < tokens; t++) {
      const from = kv.subarray(t * layerElements, (t + 1) * layerElements)
      bits.set(from, (t * LAYERS + LAYER) * layerElements)
    }
    if (tokens === 0) return
    const to = this.base + slot * this.slotStride
    this.gpu.driver.copyToDevice(to, addressOf(bits), bits.byteLength, this.gpu.stream)
    this.gpu.driver.synchronizeStream(this.gpu.stream)
  }

  [Symbol.dispose](): void {
    this.gpu.driver.synchronizeStream(this.gpu.stream)
    for (const { address, handle } of this.pages) {
      this.gpu.driver.unmap(address, this.pageBytes)
      this.gpu.driver.releasePages(handle)
    }
    this.gpu.driver.freeReservation(this.base, this.slotStride * this.slots)
  }
}

/**
 * softmax(scale · q · K) · V for one query of all heads at a position, in float64.
 * @param q [heads, headDim]
 */
export function attend(
  shape: AttentionShape,
  slot: Slot,
  q: Float32Array,
  position: number,
  window = Infinity,
): Float64Array {
  const { heads, kvHeads, headDim, scale, softcap } = shape
  const out = new Float64Array(heads * headDim)
  const first = Math.max(0, position + 1 - window)
  for (let head = 0; head < heads; head++) {
    const kvHead = Math.floor(head / (heads / kvHeads))
    const query = q.subarray(head * headDim, (head + 1) * headDim)
    const scores: number[] = []
    for (let t = first; t <= position; t++) {
      const at = (t * 2 * kvHeads + kvHead) * headDim
      let dot = 0
      for (let d = 0; d < headDim; d++) dot += query[d]! * slot.kv[at + d]!
      dot *= scale
      scores.push(softcap === undefined ? dot : softcap * Math.tanh(dot / softcap))
    }
    const top = Math.max(...scores)
    const weights = scores.map((score) => Math.exp(score - top))
    const total = weights.reduce((sum, weight) => sum + weight, 0)
    weights.forEach((weight, i) => {
      const at = ((first + i) * 2 * kvHeads + kvHeads + kvHead) * headDim
      for (let d = 0; d < headDim; d++) {
        out[head * headDim + d]! += (weight / total) * slot.kv[at + d]!
      }
    })
  }
  return out
}

export function shuffle<T>(items: T[], random: Random): void {
  for (let i = items.length - 1; i > 0; i--) {
    const j = random.below(i + 1)
    ;[items[i], items[j]] = [items[j]!, items[i]!]
  }
}
