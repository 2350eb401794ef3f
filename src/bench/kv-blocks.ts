// Owns a model of PagedAttention (Kwon et al. 2023) as vLLM has it: blocks of 16 tokens behind
// block tables, counted by reference, copied on write, full ones found again by their tokens.

import { assert, present } from '../assert.ts'
import { type KvModel, TOKEN_BYTES } from './kv-model.ts'

const BLOCK_TOKENS = 16

interface Block {
  /** Names what it holds and all before it; undefined until it is full. */
  key: number | undefined
  /** Block tables that have it; 0 is cached. */
  references: number
}

interface Table {
  blocks: Block[]
  /** Tokens of the last block, if it is not full. */
  tail: number[]
  /** Names all full blocks; 0 is none. */
  key: number
}

export class BlocksModel implements KvModel {
  copiedBytes = 0
  private readonly tables = new Map<number, Table>()
  /** Full blocks by what they hold, the least recently let go first. */
  private readonly byKey = new Map<number, Block>()
  private readonly keys = new Map<string, number>()
  private readonly cachedMax: number
  private held = 0

  /** @param cachedTokens that blocks without a sequence may keep */
  constructor(cachedTokens: number) {
    this.cachedMax = Math.floor(cachedTokens / BLOCK_TOKENS)
  }

  begin(id: number, prompt: Int32Array): number {
    const table: Table = { blocks: [], tail: [], key: 0 }
    this.tables.set(id, table)
    let found = 0
    // At least the last token is computed, so that there is something to sample from.
    while (found + BLOCK_TOKENS < prompt.length) {
      const key = this.keyOf(table.key, prompt.subarray(found, found + BLOCK_TOKENS))
      const block = this.byKey.get(key)
      if (!block) break
      this.take(block)
      table.blocks.push(block)
      table.key = key
      found += BLOCK_TOKENS
    }
    for (const token of prompt.subarray(found)) this.push(table, token)
    return found
  }

  append(id: number, token: number): void {
    this.push(this.table(id), token)
  }

  fork(id: number, from: number): void {
    const { blocks, tail, key } = this.table(from)
    for (const block of blocks) this.take(block)
    this.tables.set(id, { blocks: [...blocks], tail: [...tail], key })
  }

  end(id: number): void {
    // The last ones first, so that they are forgotten before what leads to them.
    for (const block of this.table(id).blocks.toReversed()) this.letGo(block)
    this.tables.delete(id)
    let excess = this.byKey.size - this.heldKeys() - this.cachedMax
    for (const [key, block] of this.byKey) {
      if (excess <= 0) break
      if (block.references > 0) continue
      this.byKey.delete(key)
      excess--
    }
  }

  heldBytes(): number {
    return this.held * BLOCK_TOKENS * TOKEN_BYTES
  }

  private push(table: Table, token: number): void {
    const { tail, blocks } = table
    if (tail.length === 0) blocks.push(this.take({ key: undefined, references: 0 }))
    else this.own(table)
    tail.push(token)
    if (tail.length < BLOCK_TOKENS) return
    table.key = this.keyOf(table.key, tail)
    const last = present(blocks.at(-1), 'a block')
    // Another sequence may have filled one with the same tokens: both stay, one is found.
    if (!this.byKey.has(table.key)) {
      last.key = table.key
      this.byKey.set(table.key, last)
    }
    tail.length = 0
  }

  /** The last block is about to be written to: if another table has it too, it is copied. */
  private own({ blocks, tail }: Table): void {
    const last = present(blocks.at(-1), 'a block')
    if (last.references === 1) return
    this.copiedBytes += tail.length * TOKEN_BYTES
    this.letGo(last)
    blocks[blocks.length - 1] = this.take({ key: undefined, references: 0 })
  }

  private take(block: Block): Block {
    if (block.references++ === 0) this.held++
    return block
  }

  private letGo(block: Block): void {
    assert(block.references > 0, 'a block that is let go was taken')
    if (--block.references > 0) return
    this.held--
    if (block.key === undefined) return
    // To the end of the order: the last one to be forgotten.
    this.byKey.delete(block.key)
    this.byKey.set(block.key, block)
  }

  /** The same tokens after the same ones have the same key. */
  private keyOf(before: number, tokens: ArrayLike<number>): number {
    const text = `${before}:${Array.from(tokens).join()}`
    const key = this.keys.get(text) ?? this.keys.size + 1
    this.keys.set(text, key)
    return key
  }

  private heldKeys(): number {
    let count = 0
    for (const { references } of this.byKey.values()) if (references > 0) count++
    return count
  }

  private table(id: number): Table {
    return present(this.tables.get(id), 'a block table')
  }
}
