// Owns what a memory manager must do to be compared, and the two that need no pages: a reservation
// for each sequence as long as a sequence may become, and the tokens themselves, each once.

import { TRACE_CONTEXT } from './kv-trace.ts'

/** Keys and values of SmolLM2-135M: 30 layers, 768 bytes a token in each. */
export const TOKEN_LAYERS = 30
export const TOKEN_ROW_BYTES = 768
export const TOKEN_BYTES = TOKEN_LAYERS * TOKEN_ROW_BYTES

export interface KvModel {
  /** @returns tokens of the prompt that were in memory already, so that they are not computed */
  begin(id: number, prompt: Int32Array): number
  append(id: number, token: number): void
  /** `id` begins with all that `from` has. */
  fork(id: number, from: number): void
  end(id: number): void
  /** Memory of sequences that run, each byte once; what only a cache keeps is not counted. */
  heldBytes(): number
  /** Copied from one place of memory to another, so far. */
  readonly copiedBytes: number
}

/** Every sequence gets a whole context when it begins, as servers did before paging. */
export class StaticModel implements KvModel {
  copiedBytes = 0
  private readonly lengths = new Map<number, number>()

  begin(id: number, prompt: Int32Array): number {
    this.lengths.set(id, prompt.length)
    return 0
  }

  append(id: number): void {
    this.lengths.set(id, this.lengthOf(id) + 1)
  }

  fork(id: number, from: number): void {
    const length = this.lengthOf(from)
    this.lengths.set(id, length)
    this.copiedBytes += length * TOKEN_BYTES
  }

  end(id: number): void {
    this.lengths.delete(id)
  }

  heldBytes(): number {
    return this.lengths.size * TRACE_CONTEXT * TOKEN_BYTES
  }

  private lengthOf(id: number): number {
    return this.lengths.get(id) ?? 0
  }
}

interface Token {
  parent: Token | undefined
  children: Map<number, Token>
  /** Sequences that have it. */
  sequences: number
}

/** What memory there must be: tokens that running sequences have, those they share once. */
export class TokensModel implements KvModel {
  readonly copiedBytes = 0
  private readonly root: Token = { parent: undefined, children: new Map(), sequences: 0 }
  private readonly ends = new Map<number, Token>()
  private count = 0

  begin(id: number, prompt: Int32Array): number {
    let at = this.root
    for (const token of prompt) at = this.step(at, token)
    this.ends.set(id, at)
    return 0
  }

  append(id: number, token: number): void {
    this.ends.set(id, this.step(this.ends.get(id) ?? this.root, token))
  }

  fork(id: number, from: number): void {
    const end = this.ends.get(from) ?? this.root
    for (let at: Token | undefined = end; at?.parent; at = at.parent) at.sequences++
    this.ends.set(id, end)
  }

  end(id: number): void {
    for (let at = this.ends.get(id); at?.parent; at = at.parent) {
      if (--at.sequences === 0) this.count--
    }
    this.ends.delete(id)
  }

  heldBytes(): number {
    return this.count * TOKEN_BYTES
  }

  private step(from: Token, value: number): Token {
    let token = from.children.get(value)
    if (!token) {
      token = { parent: from, children: new Map(), sequences: 0 }
      from.children.set(value, token)
    }
    if (token.sequences++ === 0) this.count++
    return token
  }
}
