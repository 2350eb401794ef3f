// Owns the launches of attention over strided keys and values on the GPU: which kernel a shape
// takes, with which sizes of blocks and scratch memory.

import { present } from '../../assert.ts'
import { FUNCTION } from '../../ffi/cuda.ts'
import { type ArgumentKind, KernelLaunch } from '../../ffi/kernel-launch.ts'
import {
  type AttentionShape,
  type AttentionVariant,
  DECODE_PIECES,
  decodeVariant,
  prefillVariant,
} from './attention-variants.ts'
import type { CudaDevice } from './device.ts'
import type { KernelSource, ModuleCache } from './module-cache.ts'

export type { AttentionShape } from './attention-variants.ts'

/** Where KV lies: token-major slots of one reservation. All in bytes but the counts. */
export interface StridedKv {
  base: number
  slotStride: number
  /** layers · 2 · kvHeads · headDim · 2 */
  tokenStride: number
  slots: number
  /** Tokens that a slot has addresses for. */
  slotTokens: number
}

/** Device addresses of one launch; rows of length 0 give zeros. */
export interface DecodeRows {
  /** [rows, heads, headDim] bf16 */
  q: number
  out: number
  /** [rows] int32: whose KV a row sees, and how many tokens of it: its own position + 1. */
  slots: number
  lengths: number
  rows: number
}

/** Device addresses of one launch; segments of count 0 are skipped. */
export interface PrefillSegments {
  /** [tokens, heads, headDim] bf16, the segments' tokens where firstRows says. */
  q: number
  out: number
  /** [segments] int32 each: first row in q, position of that token, tokens, slot. */
  firstRows: number
  starts: number
  counts: number
  slots: number
  segments: number
}

export interface AttentionOptions {
  device: CudaDevice
  modules: ModuleCache
  shape: AttentionShape
  kv: StridedKv
  /** The most rows that `decode` will be given. */
  rowsMax: number
}

/** "Everything" as a window: no position is further back. */
const NO_WINDOW = 2 ** 31 - 1

const DECODE_ARGUMENTS: readonly ArgumentKind[] = [
  ...(['u64', 'u64', 'u64', 'u64', 'u64', 'i32', 'i32', 'u64', 'u64', 'u64'] as const),
  ...(['f32', 'f32', 'u64', 'u64'] as const),
]
const PREFILL_ARGUMENTS: readonly ArgumentKind[] = [
  ...(['u64', 'u64', 'u64', 'u64', 'u64', 'u64', 'u64', 'i32', 'i32'] as const),
  ...(['u64', 'u64', 'u64', 'f32', 'f32'] as const),
]

/**
 * Attention for one model on one device. Launches read what changes from step to step out of
 * device arrays, so a captured graph is replayed with new slots, lengths and positions; its rows,
 * segments and addresses stay. Launches share scratch memory: keep them on one stream.
 */
export class CudaAttention {
  private readonly options: AttentionOptions
  private readonly modules: number[] = []
  /** By variant name. */
  private readonly decoders = new Map<string, KernelLaunch>()
  private readonly prefiller: KernelLaunch
  private readonly arrivals: number
  private readonly partial: number

  /** Compiles, or finds compiled, every kernel that it will launch. */
  constructor(options: AttentionOptions) {
    this.options = options
    const { device, shape, rowsMax } = options
    const { driver, info } = device
    this.prefiller = this.prepare(prefillVariant(shape), PREFILL_ARGUMENTS)
    let partialBytes = 0
    for (const rows of [1, rowsMax]) {
      const variant = decodeVariant(shape, rows, info)
      const launch = this.prepare(variant, DECODE_ARGUMENTS)
      this.decoders.set(variant.name, launch)
      const blocks = present(launch.shape[0], 'blocks of a grid')
      partialBytes = Math.max(partialBytes, blocks * DECODE_PIECES * variant.pieceBytes)
    }
    this.partial = driver.allocate(partialBytes)
    const counters = rowsMax * shape.kvHeads
    this.arrivals = driver.allocate(counters * 4)
    driver.fill32(this.arrivals, 0, counters, 0)
    driver.synchronize()
  }

  /**
   * Each row's one query over the tokens of its slot.
   * @param window tokens that a query sees, itself included; undefined for all
   */
  decode(stream: number, rows: DecodeRows, layer: number, window?: number): void {
    const { device, shape, kv } = this.options
    const { name } = decodeVariant(shape, rows.rows, device.info)
    const launch = present(this.decoders.get(name), `the decode kernel of ${rows.rows} rows`)
    launch.setAll(
      ...[rows.q, rows.out, kv.base, rows.slots, rows.lengths, rows.rows],
      ...[window ?? NO_WINDOW, kv.slotStride, kv.tokenStride, this.keyOffset(layer)],
      ...[shape.scale, shape.softcap ?? 0, this.partial, this.arrivals],
    )
    device.driver.launch(launch, stream)
  }

  /**
   * The segments' queries, each over its slot's tokens up to its own position.
   * @param window tokens that a query sees, itself included; undefined for all
   */
  prefill(stream: number, segments: PrefillSegments, layer: number, window?: number): void {
    const { device, shape, kv } = this.options
    this.prefiller.setAll(
      ...[segments.q, segments.out, kv.base, segments.firstRows, segments.starts],
      ...[segments.counts, segments.slots, segments.segments, window ?? NO_WINDOW],
      ...[kv.slotStride, kv.tokenStride, this.keyOffset(layer), shape.scale, shape.softcap ?? 0],
    )
    device.driver.launch(this.prefiller, stream)
  }

  /** Nothing that was launched may still be running. */
  close(): void {
    const { driver } = this.options.device
    driver.free(this.partial)
    driver.free(this.arrivals)
    for (const module of this.modules) driver.unloadModule(module)
  }

  /** Bytes from a token's start to its keys of a layer; its values follow them. */
  private keyOffset(layer: number): number {
    return layer * 2 * this.options.shape.kvHeads * this.options.shape.headDim * 2
  }

  /** A launch on as many blocks as the device runs at once: each takes its share of the work. */
  private prepare(variant: AttentionVariant, kinds: readonly ArgumentKind[]): KernelLaunch {
    const { device, modules } = this.options
    const { driver, info } = device
    const source: KernelSource = { file: variant.file, defines: variant.defines }
    const module = driver.loadModule(modules.get(source, device.architecture).image)
    this.modules.push(module)
    const kernel = driver.functionOf(module, variant.kernel)
    driver.setFunctionAttribute(kernel, FUNCTION.dynamicSharedBytesMax, variant.sharedBytes)
    const { threads, sharedBytes } = variant
    const each = driver.blocksPerMultiprocessor(kernel, threads, sharedBytes)
    const launch = new KernelLaunch(kernel, kinds)
    return launch
      .grid(each * info.multiprocessors)
      .threads(threads)
      .sharedBytes(sharedBytes)
  }
}
