// Owns where activations live on the GPU: what a node makes gets a place in one arena, and places
// are used again once nobody reads them (linear scan; Poletto & Sarkar 1999). Values of one joined
// product lie side by side in one row. A product may be done in one go with what follows it
// (fuse.ts): its blocks then write results while others still read the input, so these two never
// share a place.

import { present } from '../../assert.ts'
import type { Program, Rows, Value } from '../../model/program.ts'
import { makes, type Node, readsOf } from './fuse.ts'

export interface Place {
  /** Bytes from the arena's start to the value's first element. */
  offset: number
  /** Elements from a row to the next. */
  stride: number
  width: number
}

const BF16 = 2
const ALIGNMENT = 256

export class Buffers {
  readonly bytes: number
  private readonly places = new Map<Value, Place>()

  /** @param rowsMax rows that a value of each kind may have */
  constructor(nodes: readonly Node[], program: Program, rowsMax: Readonly<Record<Rows, number>>) {
    const lastUse = new Map<Value, number>()
    nodes.forEach((node, i) => {
      for (const value of [...readsOf(node), ...makes(node)]) lastUse.set(value, i)
      const before = nodes[i - 1]
      if (before?.kind === 'linear' && ridesAlong(node)) lastUse.set(before.in, i)
    })
    const { heads, headDim } = program.config
    // Values beyond the program's are rotated queries.
    const widthOf = (value: Value) => program.widths[value] ?? heads * headDim
    const free: { offset: number; bytes: number }[] = []
    let live: { offset: number; bytes: number; until: number }[] = []
    let end = 0
    nodes.forEach((node, i) => {
      const made = makes(node)
      if (made.length > 0) {
        const stride = made.reduce((sum, value) => sum + widthOf(value), 0)
        const rows =
          rowsMax['rows' in node ? node.rows : node.kind === 'select' ? 'outputs' : 'tokens']
        const bytes = Math.ceil((stride * rows * BF16) / ALIGNMENT) * ALIGNMENT
        const hole = free.find((space) => space.bytes >= bytes)
        const offset = hole?.offset ?? end
        if (hole) {
          hole.offset += bytes
          hole.bytes -= bytes
        } else {
          end += bytes
        }
        const until = Math.max(...made.map((value) => present(lastUse.get(value), 'a use')))
        live.push({ offset, bytes, until })
        let at = offset
        for (const value of made) {
          this.places.set(value, { offset: at, stride, width: widthOf(value) })
          at += widthOf(value) * BF16
        }
      }
      for (const block of live) if (block.until <= i) free.push(block)
      live = live.filter((block) => block.until > i)
      coalesce(free)
    })
    this.bytes = end
  }

  place(value: Value): Place {
    return present(this.places.get(value), `the place of value ${value}`)
  }
}

/** Whether a product before it may do it, too. */
function ridesAlong({ kind }: Node): boolean {
  return kind === 'rope' || kind === 'glu'
}

/** Joins neighbouring free spaces, so that a later larger value fits. */
function coalesce(free: { offset: number; bytes: number }[]): void {
  free.sort((a, b) => a.offset - b.offset)
  for (let i = free.length - 1; i > 0; i--) {
    const [left, right] = [free[i - 1], free[i]]
    if (left && right && left.offset + left.bytes === right.offset) {
      free.splice(i - 1, 2, { offset: left.offset, bytes: left.bytes + right.bytes })
    }
  }
}
