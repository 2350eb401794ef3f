// Owns matrix products through cuBLASLt: which of its algorithms is fastest for a shape on this
// GPU is measured once, the best of eight, and kept in a file.

import { present } from '../../assert.ts'
import { LatticeError } from '../../errors.ts'
import type { CudaDriver, GpuDevice } from '../../ffi/cuda.ts'
import { type CublasLt, MATRIX, type MatmulAlgorithm, type MatmulPlan } from '../../ffi/cublaslt.ts'
import { Choices, choicesPath } from './choices.ts'
import { fastest } from './fastest.ts'

export const WORKSPACE_BYTES = 64 << 20

/** Heuristic answers that are measured. */
const CANDIDATES = 8
/** What a tuned number of rows may be above those needed: an untuned product loses as much. */
const SLACK = 1.25

/**
 * out = x · Wᵀ (+ out): W [m, k] bf16 by rows, x [n, k] bf16, out [n, m] with `stride`. With `e4m3`
 * both are of that type, and nothing is scaled: sums stay in the tensor cores, whose few bits cost
 * 1e-3 of a result where the operands' own rounding costs 4e-2.
 */
export interface Product {
  m: number
  k: number
  stride: number
  float32: boolean
  accumulate: boolean
  e4m3?: boolean
}

interface Prepared {
  plan: MatmulPlan
  algorithm: MatmulAlgorithm
}

interface Kept {
  algorithm: string
  workspaceBytes: number
}

/** Token counts that products are tuned and, but for multiples of the last, made for. */
const COUNTS = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192]
const COARSE = 128

/** What a count of rows is rounded up to: rows beyond the step's are computed and never read. */
export function paddedRows(rows: number): number {
  const count = COUNTS.find((c) => c >= rows && c <= 4 * COARSE)
  return count ?? Math.ceil(rows / COARSE) * COARSE
}

export class Matmuls {
  private readonly driver: CudaDriver
  private readonly lt: CublasLt
  private readonly handle: number
  private readonly workspace: number
  /** By product and rows, as they are asked for. */
  private readonly byProduct = new Map<Product, Map<number, Prepared>>()
  /** Numbers of rows that were measured. */
  private readonly tuned = new Set<number>()
  private readonly prepared = new Map<string, Prepared>()
  private readonly kept: Choices<Kept>

  /** @param folder where measured choices are kept */
  constructor(driver: CudaDriver, lt: CublasLt, device: GpuDevice, folder: string) {
    this.driver = driver
    this.lt = lt
    this.handle = lt.createHandle()
    this.workspace = driver.allocate(WORKSPACE_BYTES)
    this.kept = new Choices(choicesPath(folder, 'products', device, driver.version, lt.version))
  }

  /**
   * Queues a product of `rows`, or of a few more if that many were tuned.
   * A shape that was not takes the library's first choice for it.
   * @param room rows that x and out have: `paddedRows(rows)` or more
   */
  run(
    product: Product,
    rows: number,
    room: number,
    weight: number,
    x: number,
    out: number,
    stream: number,
  ): void {
    const { plan, algorithm } = this.preparedFor(product, rows, room)
    const { workspace, handle } = this
    const args = [weight, x, out, workspace, stream] as const
    this.lt.matmul(handle, plan, algorithm, ...args, product.accumulate)
  }

  /**
   * Measures the shapes that are not known yet. Each run multiplies with another of `weights`, so
   * that none is read from the cache; `x` and `out` are scratch that all of them fit in.
   * @param enduring as `fastest` takes it
   */
  tune(
    product: Product,
    rows: number,
    weights: readonly number[],
    x: number,
    out: number,
    enduring = false,
  ): void {
    const n = paddedRows(rows)
    const key = keyOf(product, n)
    this.tuned.add(n)
    if (this.kept.get(key)) return this.load(product, rows, present(weights[0], 'a weight'), x, out)
    const plan = this.planOf(product, n)
    const found = this.lt.algorithms(this.handle, plan, WORKSPACE_BYTES, CANDIDATES)
    let i = 0
    const queue = (algorithm: MatmulAlgorithm, stream: number) => {
      const weight = present(weights[i++ % weights.length], 'a weight')
      const { workspace, handle } = this
      this.lt.matmul(handle, plan, algorithm, weight, x, out, workspace, stream, false)
    }
    const best = fastest(this.driver, found, queue, enduring)
    this.lt.destroyPlan(plan)
    if (!best) throw noAlgorithm(product, n)
    const { block, workspaceBytes } = best
    const algorithm = Buffer.from(block.bytes).toString('base64')
    this.kept.set(key, { algorithm, workspaceBytes })
  }

  /** Multiplies once, so that the library loads the kernel now. */
  private load(product: Product, rows: number, weight: number, x: number, out: number): void {
    const stream = this.driver.createStream()
    this.run({ ...product, accumulate: false }, rows, paddedRows(rows), weight, x, out, stream)
    // The workspace serves one product at a time: its kernels count and sum there.
    this.driver.synchronizeStream(stream)
    this.driver.destroyStream(stream)
  }

  /** Whether `tune` need not measure it. */
  knows(product: Product, rows: number): boolean {
    return this.kept.get(keyOf(product, paddedRows(rows))) !== undefined
  }

  /** Writes what was measured, whole or not at all; if it cannot be kept it is measured again. */
  save(): void {
    this.kept.save()
  }

  close(): void {
    for (const { plan } of this.prepared.values()) this.lt.destroyPlan(plan)
    this.driver.free(this.workspace)
    this.lt.destroyHandle(this.handle)
  }

  private preparedFor(product: Product, rows: number, room: number): Prepared {
    const known = this.byProduct.get(product) ?? new Map<number, Prepared>()
    this.byProduct.set(product, known)
    const prepared = known.get(rows) ?? this.prepare(product, this.rowsFor(product, rows, room))
    known.set(rows, prepared)
    return prepared
  }

  private rowsFor(product: Product, rows: number, room: number): number {
    const padded = paddedRows(rows)
    const most = Math.min(room, padded * SLACK)
    const tuned = [...this.tuned].filter(
      (n) => n >= padded && n <= most && this.kept.get(keyOf(product, n)),
    )
    return tuned.length > 0 ? Math.min(...tuned) : padded
  }

  private prepare(product: Product, n: number): Prepared {
    const key = `${keyOf(product, n)} ${product.accumulate}`
    const known = this.prepared.get(key)
    if (known) return known
    const plan = this.planOf(product, n)
    const kept = this.kept.get(keyOf(product, n))
    const algorithm = kept
      ? this.lt.algorithm(Buffer.from(kept.algorithm, 'base64'), kept.workspaceBytes)
      : this.lt.algorithms(this.handle, plan, WORKSPACE_BYTES, 1)[0]
    if (!algorithm) throw noAlgorithm(product, n)
    const prepared = { plan, algorithm }
    this.prepared.set(key, prepared)
    return prepared
  }

  private planOf({ m, k, stride, float32, e4m3 = false }: Product, n: number): MatmulPlan {
    const type = e4m3 ? MATRIX.e4m3 : MATRIX.bf16
    // Arrays by rows are matrices by columns: Wᵀ is [k, m] and comes transposed back.
    return this.lt.plan(
      { type, rows: k, columns: m, leading: k },
      { type, rows: k, columns: n, leading: k },
      { type: float32 ? MATRIX.f32 : MATRIX.bf16, rows: m, columns: n, leading: stride },
      { transposeA: true, fastSums: e4m3 },
    )
  }
}

function keyOf({ m, k, stride, float32, e4m3 }: Product, n: number): string {
  return `${m} ${k} ${n} ${stride} ${float32 ? 'f32' : 'bf16'}${e4m3 ? ' e4m3' : ''}`
}

function noAlgorithm({ m, k }: Product, n: number): LatticeError {
  return new LatticeError(
    'backend_failed',
    `The matrix library has no algorithm for [${m}, ${k}] times ${n} tokens.`,
    { todo: 'Update the CUDA libraries, or use --device cpu.' },
  )
}
