// Owns the launches of attention over strided keys and values on the GPU: which kernel a shape
// takes, with which sizes of blocks and scratch memory.

import { assert, present } from '../../assert.ts'
import { FUNCTION } from '../../ffi/cuda.ts'
import { type ArgumentKind, KernelLaunch } from '../../ffi/kernel-launch.ts'
import {
  type AttentionShape,
  type AttentionVariant,
  attentionVariants,
} from './attention-variants.ts'
import type { CudaDevice } from './device.ts'
import type { ModuleCache } from './module-cache.ts'

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

type Kinds = Readonly<Record<string, ArgumentKind>>

/** Arguments of attentionDecode, in their order. */
const DECODE: Kinds = {
  q: 'u64',
  out: 'u64',
  map: 'bytes128',
  kv: 'u64',
  slots: 'u64',
  lengths: 'u64',
  rows: 'i32',
  window: 'i32',
  headRow: 'i32',
  slotStride: 'u64',
  tokenStride: 'u64',
  scale: 'f32',
  softcap: 'f32',
  partial: 'u64',
  arrivals: 'u64',
}
/** Arguments of attentionPrefill on Hopper, and elsewhere. */
const HOPPER: Kinds = {
  q: 'u64',
  out: 'u64',
  map: 'bytes128',
  kv: 'u64',
  firstRows: 'u64',
  starts: 'u64',
  counts: 'u64',
  slots: 'u64',
  segments: 'i32',
  window: 'i32',
  headRow: 'i32',
  slotStride: 'u64',
  tokenStride: 'u64',
  scale: 'f32',
  softcap: 'f32',
}
const PORTABLE: Kinds = {
  q: 'u64',
  out: 'u64',
  kv: 'u64',
  firstRows: 'u64',
  starts: 'u64',
  counts: 'u64',
  slots: 'u64',
  segments: 'i32',
  window: 'i32',
  slotStride: 'u64',
  tokenStride: 'u64',
  keyOffset: 'u64',
  scale: 'f32',
  softcap: 'f32',
}

/** cuTensorMapEncodeTiled's numbers (cuda.h). */
const TENSOR_MAP = { bfloat16: 9, swizzle128: 3, promotion256: 3 } as const

/** A kernel whose arguments are set by name. */
class NamedLaunch {
  readonly launch: KernelLaunch
  private readonly names: readonly string[]

  constructor(kernel: number, kinds: Kinds) {
    this.launch = new KernelLaunch(kernel, Object.values(kinds))
    this.names = Object.keys(kinds)
  }

  /** Sets those that the kernel has. */
  set(values: Readonly<Record<string, number>>): this {
    this.names.forEach((name, i) => {
      const value = values[name]
      if (value !== undefined) this.launch.set(i, value)
    })
    return this
  }

  addressOf(name: string): number {
    return this.launch.addressOfArgument(this.names.indexOf(name))
  }
}

/**
 * Attention for one model on one device. Launches read what changes from step to step out of
 * device arrays, so a captured graph is replayed with new slots, lengths and positions; its rows,
 * segments and addresses stay. Launches share scratch memory: keep them on one stream.
 */
export class CudaAttention {
  private readonly options: AttentionOptions
  private readonly modules: number[] = []
  private readonly decoder: NamedLaunch
  private readonly prefiller: NamedLaunch
  private readonly arrivals: number
  private readonly partial: number

  /**
   * Compiles, or finds compiled, every kernel that it will launch.
   * @throws LatticeError `model_unsupported` for heads that no kernel takes; what ModuleCache does
   */
  constructor(options: AttentionOptions) {
    this.options = options
    const { shape, rowsMax } = options
    const { driver, info } = options.device
    const variants = attentionVariants(shape, info.capability, info.sharedBytesPerBlock)
    const { decode, prefill } = variants
    this.decoder = this.prepare(decode, DECODE)
    this.prefiller = this.prepare(prefill, prefill.boxTokens ? HOPPER : PORTABLE)
    // It reads older tokens' keys while the kernel that appends the newest ones ends.
    if (info.capability >= 90) this.decoder.launch.programmatic()
    const blocks = present(this.decoder.launch.shape[0], 'blocks of a grid')
    this.partial = driver.allocate(blocks * decode.scratchBytes)
    const counters = rowsMax * decode.counters
    this.arrivals = driver.allocate(counters * 4)
    driver.fill32(this.arrivals, 0, counters, 0)
    driver.synchronize()
    this.decoder.set({ partial: this.partial, arrivals: this.arrivals })
  }

  /**
   * Each row's one query over the tokens of its slot.
   * @param window tokens that a query sees, itself included; undefined for all
   */
  decode(stream: number, rows: DecodeRows, layer: number, window?: number): void {
    assert(rows.rows <= this.options.rowsMax, 'decode has counters for its rows')
    this.launch(this.decoder, stream, { ...rows, ...this.placeOf(layer), ...windowOf(window) })
  }

  /**
   * The segments' queries, each over its slot's tokens up to its own position.
   * @param window tokens that a query sees, itself included; undefined for all
   */
  prefill(stream: number, segments: PrefillSegments, layer: number, window?: number): void {
    const place = this.placeOf(layer)
    this.launch(this.prefiller, stream, { ...segments, ...place, ...windowOf(window) })
  }

  /** Nothing that was launched may still be running. */
  close(): void {
    const { driver } = this.options.device
    driver.free(this.partial)
    driver.free(this.arrivals)
    for (const module of this.modules) driver.unloadModule(module)
  }

  private launch(kernel: NamedLaunch, stream: number, values: Readonly<Record<string, number>>) {
    this.options.device.driver.launch(kernel.set(values).launch, stream)
  }

  /** Where a token's first key of a layer lies: in bytes, and in rows of one head. */
  private placeOf(layer: number): { keyOffset: number; headRow: number } {
    const { kvHeads, headDim } = this.options.shape
    const headRow = layer * 2 * kvHeads
    return { keyOffset: headRow * headDim * 2, headRow }
  }

  private prepare(variant: AttentionVariant, kinds: Kinds): NamedLaunch {
    const { device, modules, shape, kv } = this.options
    const { driver, info, architecture } = device
    const { file, defines, threads, sharedBytes } = variant
    const module = driver.loadModule(modules.get({ file, defines }, architecture).image)
    this.modules.push(module)
    const kernel = driver.functionOf(module, variant.kernel)
    driver.setFunctionAttribute(kernel, FUNCTION.dynamicSharedBytesMax, sharedBytes)
    const blocks = driver.blocksPerMultiprocessor(kernel, threads, sharedBytes)
    const named = new NamedLaunch(kernel, kinds)
    named.launch
      .grid(blocks * info.multiprocessors)
      .threads(threads)
      .sharedBytes(sharedBytes)
    if ('map' in kinds && info.capability >= 90) {
      this.encodeMap(named.addressOf('map'), present(variant.boxTokens, 'tokens of a box'))
    }
    const { slotStride, tokenStride } = kv
    const { scale, softcap = 0 } = shape
    return named.set({ kv: kv.base, slotStride, tokenStride, scale, softcap })
  }

  /** The whole reservation as a tensor; the copy engine reads only boxes that kernels ask for. */
  private encodeMap(into: number, tokens: number): void {
    const { device, shape, kv } = this.options
    const headBytes = shape.headDim * 2
    device.driver.encodeTensorMap(into, {
      dataType: TENSOR_MAP.bfloat16,
      address: kv.base,
      dimensions: [shape.headDim, kv.tokenStride / headBytes, kv.slotTokens, kv.slots],
      strides: [headBytes, kv.tokenStride, kv.slotStride],
      box: [64, 1, tokens, 1],
      swizzle: TENSOR_MAP.swizzle128,
      l2Promotion: TENSOR_MAP.promotion256,
    })
  }
}

function windowOf(window = NO_WINDOW): { window: number } {
  return { window }
}
