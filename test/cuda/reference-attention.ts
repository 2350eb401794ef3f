// Owns attention by attention-reference.cu: slow and simple, for any shape of heads. Logits of
// models whose heads the fast kernels do not take are compared on it, and those kernels with it.

import type { Attention } from '../../src/backends/cuda/lower-context.ts'
import type { DecodeRows, PrefillSegments } from '../../src/backends/cuda/attention.ts'
import type { KernelFinder } from '../../src/backends/cuda/kernels.ts'
import type { StepState } from '../../src/backends/cuda/state.ts'
import type { CudaDriver } from '../../src/ffi/cuda.ts'
import { type ArgumentKind, KernelLaunch } from '../../src/ffi/kernel-launch.ts'
import type { KvLayout } from '../../src/kv/layout.ts'
import type { ModelConfig } from '../../src/model/model.ts'

const KINDS: readonly ArgumentKind[] = [
  ...(['u64', 'u64', 'i32', 'i32', 'u64', 'u64', 'i32', 'i32', 'i32', 'u64', 'u64'] as const),
  ...(['f32', 'i32'] as const),
]

export class ReferenceAttention implements Attention {
  private readonly driver: CudaDriver
  private readonly state: StepState
  private readonly config: ModelConfig
  private readonly layout: KvLayout
  private readonly launch: KernelLaunch

  constructor(
    driver: CudaDriver,
    config: ModelConfig,
    layout: KvLayout,
    state: StepState,
    find: KernelFinder,
  ) {
    this.driver = driver
    this.config = config
    this.layout = layout
    this.state = state
    const kernel = find('attention-reference.cu', 'attentionReference')
    this.launch = new KernelLaunch(kernel, KINDS).threads(256)
  }

  decode(stream: number, rows: DecodeRows, layer: number, window = 0): void {
    const { tokens, outputs } = this.state.rows
    const { positions, bases } = rows.slots === tokens.regions ? tokens : outputs
    this.run(stream, rows.q, rows.out, positions, bases, rows.rows, layer, window)
  }

  /** Every row that a step could have: those beyond its tokens are computed and never read. */
  prefill(stream: number, { q, out }: PrefillSegments, layer: number, window = 0): void {
    const { positions, bases } = this.state.rows.tokens
    this.run(stream, q, out, positions, bases, this.state.limits.tokens, layer, window)
  }

  close(): void {}

  private run(
    stream: number,
    q: number,
    out: number,
    positions: number,
    bases: number,
    rows: number,
    layer: number,
    window: number,
  ): void {
    const { heads, kvHeads, headDim, attentionScale } = this.config
    const { tokenStride, layerStride } = this.layout
    const width = heads * headDim
    this.launch.setAll(
      ...[q, out, width, width, positions, bases, heads, kvHeads, headDim, tokenStride],
      ...[layer * layerStride, attentionScale, window],
    )
    this.driver.launch(this.launch.grid(heads, rows), stream)
  }
}
