// Owns how sample.cu is launched: how many blocks share a row, and the shared memory in which they
// hold it.

import { type CudaDriver, FUNCTION, type GpuDevice } from '../../ffi/cuda.ts'
import { type ArgumentKind, KernelLaunch } from '../../ffi/kernel-launch.ts'
import type { KernelFinder } from './kernels.ts'

/** As sample.cu has them. */
const THREADS = 1024
const CLUSTER_MAX = 8
/** A run of a warp is a multiple of these, 16 bytes each. */
const GROUPS = 8
const GROUP_TOKENS = 4
const WARPS = THREADS / 32

/** Compute capability from which on blocks may form clusters. */
const CLUSTERS = 90
/** Of multiprocessors, what clusters of 4 or 8 blocks can fill: the rest is too scattered. */
const CLUSTERED = 7 / 8
/** Tokens of a row that make one more block worth its while. */
const TOKENS_OF_BLOCK = 4096

const KINDS: readonly ArgumentKind[] = [
  ...(['u64', 'i32', 'u64', 'u64', 'u64', 'u64', 'u64', 'u64', 'u64', 'u64'] as const),
  ...(['u64', 'i32', 'i32', 'u64'] as const),
]

/** Of a GPU, what decides. */
type Shape = Pick<GpuDevice, 'capability' | 'multiprocessors'>

/**
 * Blocks that share each of so many rows: all rows at once if that can be, and two blocks at least,
 * because one alone holds too little of a large vocabulary.
 */
export function blocksOfRow(rows: number, vocab: number, gpu: Shape): number {
  if (gpu.capability < CLUSTERS) return 1
  const room = gpu.multiprocessors * CLUSTERED
  let blocks = 1
  const more = () => blocks < 2 || rows * 2 * blocks <= room
  while (blocks < CLUSTER_MAX && vocab > blocks * TOKENS_OF_BLOCK && more()) blocks *= 2
  return blocks
}

export class SampleLaunch {
  readonly launch: KernelLaunch
  private readonly gpu: Shape
  private readonly vocab: number
  /** Dynamic shared memory that a block may have. */
  private readonly room: number

  /** @param args of `sample`, in its order */
  constructor(driver: CudaDriver, find: KernelFinder, gpu: GpuDevice, args: readonly number[]) {
    const kernel = find('sample.cu', 'sample')
    this.room = gpu.sharedBytesPerBlock - driver.functionAttribute(kernel, FUNCTION.sharedBytes)
    driver.setFunctionAttribute(kernel, FUNCTION.dynamicSharedBytesMax, this.room)
    this.launch = new KernelLaunch(kernel, KINDS).setAll(...args).threads(THREADS)
    this.gpu = gpu
    this.vocab = this.launch.get(1)
  }

  /** For so many rows; `blocks` of each, a power of two. */
  of(rows: number, blocks = blocksOfRow(rows, this.vocab, this.gpu)): KernelLaunch {
    const { launch, room } = this
    const run = Math.ceil(this.vocab / GROUP_TOKENS / blocks / WARPS / GROUPS) * GROUPS
    launch.grid(blocks, rows).sharedBytes(Math.min(run * WARPS * GROUP_TOKENS * 4, room))
    // Also of one, as soon as it was set once.
    if (this.gpu.capability >= CLUSTERS) launch.cluster(blocks)
    return launch
  }
}
