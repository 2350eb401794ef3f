// Owns what is measured at a start: which algorithm of the matrix library each product takes, and
// where own kernels are faster. What is known from an earlier start is not measured again.

import type { CudaDriver } from '../../ffi/cuda.ts'
import { bucketsUpTo, promptRows } from './buckets.ts'
import type { Choices } from './choices.ts'
import type { E4m3 } from './e4m3-rows.ts'
import { GEMV_TOKENS_MAX } from './gemv.ts'
import { HOPPER_TOKENS_MAX } from './hopper-products.ts'
import type { Lowering } from './lower.ts'
import { type Matmuls, paddedRows, type Product } from './matmul.ts'

/** A model that is built, and nothing of which runs. */
export interface Untuned {
  driver: CudaDriver
  stream: number
  decoding: Lowering
  mixed: Lowering
  matmuls: Matmuls
  /** Of own kernels; undefined if none are to be measured. */
  choices: Choices | undefined
  e4m3: E4m3 | undefined
  /** Of activations, which are overwritten. */
  arena: number
  rowsMax: number
  stepTokens: number
  /** Queues the filling of memory with random bf16. */
  fillRandom: (address: number, elements: number) => void
  /** Is told of what takes long, before it begins. */
  say: ((what: string) => void) | undefined
}

/** Products of a program, and the rows that each is measured with. */
interface Wanted {
  of: Lowering
  rows: readonly number[]
  which: (product: Product) => boolean
}

/** Graphs of a way, of which the fastest counts. */
const TIMED_GRAPHS = 4

/**
 * Measures every product of decode steps of any bucket, and of a step full of prompts.
 * @returns how many were not known
 */
export function tuneProducts(model: Untuned): number {
  const { decoding, mixed, rowsMax, matmuls, choices } = model
  const buckets = bucketsUpTo(rowsMax)
  const prompts = promptRows(model.stepTokens).filter((rows) => rows > rowsMax)
  // Of prompts, only a few rows have logits.
  const ofPrompts = ({ float32 }: Product): boolean => !float32
  const all = (): boolean => true
  const wanted: readonly Wanted[] = [
    { of: decoding, rows: buckets, which: all },
    { of: mixed, rows: buckets, which: all },
    { of: mixed, rows: prompts, which: ofPrompts },
  ]
  const unknown = wanted.reduce((sum, one) => sum + unknownTo(matmuls, one), 0)
  if (unknown > 0) {
    model.say?.(`measuring ${unknown} matrix products, once for this model and GPU`)
  }
  for (const one of wanted) tuneFor(model, one)
  matmuls.save()
  const few = buckets.filter((rows) => rows > GEMV_TOKENS_MAX && rows <= HOPPER_TOKENS_MAX)
  if (choices) tuneOwn(model, few, choices)
  return unknown
}

function unknownTo(matmuls: Matmuls, { of, rows, which }: Wanted): number {
  const products = of.productShapes().map(({ product }) => product)
  const wanted = products
    .filter(which)
    .flatMap((product) => rows.map((count) => [product, count] as const))
  return wanted.filter(([product, count]) => !matmuls.knows(product, count)).length
}

function tuneFor(
  { driver, matmuls, e4m3, stepTokens, rowsMax, fillRandom }: Untuned,
  { of, rows, which }: Wanted,
): void {
  if (rows.length === 0) return
  const shapes = of.productShapes().filter(({ product }) => which(product))
  const most = Math.max(...rows)
  const full = paddedRows(stepTokens)
  const bytes = Math.max(...shapes.map(({ product: { k, m } }) => most * (k * 2 + m * 4)))
  const scratch = driver.allocate(bytes)
  fillRandom(scratch, bytes / 2)
  const wide = Math.max(0, ...shapes.map(({ product }) => (product.e4m3 ? product.k : 0)))
  if (wide > 0) e4m3?.rows(scratch, e4m3.x, e4m3.scales, most, wide)
  driver.synchronize()
  for (const { product, weights } of shapes) {
    const out = scratch + most * product.k * 2
    const x = (product.e4m3 && e4m3?.x) || scratch
    for (const count of rows) {
      // Many steps that are full of prompts may follow each other.
      const enduring = count === full && count > rowsMax
      matmuls.tune(product, count, weights, x, out, enduring)
    }
  }
  driver.free(scratch)
}

/** Measures own kernels against the library and what surrounds its products. */
function tuneOwn(model: Untuned, tokens: readonly number[], choices: Choices): void {
  const { driver, stream, decoding } = model
  // Of zeros a product would be faster than it is.
  model.fillRandom(model.arena, decoding.buffers.bytes / 2)
  const events = [driver.createEvent(true), driver.createEvent(true)] as const
  decoding.tuneHopper(tokens, (queue) => {
    driver.beginCapture(stream)
    queue()
    const graph = driver.endCapture(stream)
    const executable = driver.instantiate(graph)
    const times = Array.from({ length: TIMED_GRAPHS }, () => {
      driver.recordEvent(events[0], stream)
      driver.launchGraph(executable, stream)
      driver.recordEvent(events[1], stream)
      driver.synchronizeEvent(events[1])
      return driver.elapsedMs(...events) * 1e3
    })
    driver.destroyExecutable(executable)
    driver.destroyGraph(graph)
    return Math.min(...times)
  })
  for (const event of events) driver.destroyEvent(event)
  choices.save()
}
