// Owns where activations live: each value of a program gets a place in one arena, and places are
// used again as soon as their value has been read for the last time (linear scan; Poletto &
// Sarkar 1999). Values made by one joined product lie side by side in one row.

import { assert, present } from '../../assert.ts'
import type { Op, Program, Value } from '../../model/program.ts'

export interface Place {
  /** Bytes from the start of the arena. */
  offset: number
  /** Bytes from a token's row to the next. */
  rowBytes: number
}

interface Block {
  values: Value[]
  rowBytes: number
  offset: number
  bytes: number
  lastUse: number
}

const ALIGNMENT = 64

export class Activations {
  readonly bytes: number
  private readonly places = new Map<Value, Place>()

  /** @param joined whether a linear op's projections share one row. */
  constructor(program: Program, maxTokens: number, joined: (op: Op) => boolean) {
    const lastUse = new Map<Value, number>()
    program.ops.forEach((op, i) => {
      for (const value of [...reads(op), ...writes(op)]) lastUse.set(value, i)
    })
    const free: { offset: number; bytes: number }[] = []
    let live: Block[] = []
    let end = 0

    const allocate = (values: Value[]): Block => {
      const width = values.reduce((sum, value) => sum + present(program.widths[value], 'width'), 0)
      const rowBytes = width * 4
      const bytes = Math.ceil((rowBytes * maxTokens) / ALIGNMENT) * ALIGNMENT
      const last = Math.max(...values.map((value) => lastUse.get(value) ?? 0))
      let hole = free.findIndex((space) => space.bytes >= bytes)
      if (hole < 0) {
        hole = free.push({ offset: end, bytes }) - 1
        end += bytes
      }
      const space = present(free[hole], 'space')
      const block = { values, rowBytes, offset: space.offset, bytes, lastUse: last }
      space.offset += bytes
      space.bytes -= bytes
      if (space.bytes === 0) free.splice(hole, 1)
      live.push(block)
      let offset = block.offset
      for (const value of values) {
        this.places.set(value, { offset, rowBytes })
        offset += present(program.widths[value], 'width') * 4
      }
      return block
    }

    program.ops.forEach((op, i) => {
      const made = writes(op)
      const reused = op.kind === 'add' ? live.find((block) => dies(block, op.a, i)) : undefined
      if (op.kind === 'add' && reused) {
        // A sum may overwrite its first operand if nobody reads that again.
        reused.values = made
        reused.lastUse = lastUse.get(op.out) ?? i
        this.places.set(op.out, this.place(op.a))
      } else if (made.length > 0) {
        if (joined(op)) allocate(made)
        else for (const one of made) allocate([one])
      }
      for (const block of live) if (block.lastUse <= i) free.push(block)
      live = live.filter((block) => block.lastUse > i)
      coalesce(free)
    })
    this.bytes = end
  }

  place(value: Value): Place {
    const place = this.places.get(value)
    assert(place, `value ${value} has a place`)
    return place
  }
}

function dies(block: Block, operand: Value, at: number): boolean {
  return block.values.length === 1 && block.values[0] === operand && block.lastUse === at
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

function reads(op: Op): Value[] {
  switch (op.kind) {
    case 'embed':
      return []
    case 'norm':
    case 'linear':
    case 'select':
    case 'logits':
      return [op.in]
    case 'rope':
      return [...op.values]
    case 'kvAppend':
      return [op.k, op.v]
    case 'attention':
      return [op.q]
    case 'glu':
      return [op.gate, op.up]
    case 'add':
      return [op.a, op.b]
  }
}

function writes(op: Op): Value[] {
  switch (op.kind) {
    case 'linear':
      return op.projections.map((projection) => projection.out)
    case 'rope':
    case 'kvAppend':
    case 'logits':
      return []
    default:
      return [op.out]
  }
}
