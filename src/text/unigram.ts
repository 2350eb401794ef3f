// Owns the unigram language model: of all ways to cut a text into pieces, the most probable one,
// found by Viterbi (Kudo 2018), with byte fallback for what no piece covers.

import { byteEntry } from './bpe.ts'
import { LatticeError } from '../errors.ts'
import { PairTable } from './merger.ts'
import { type PieceModel, WordCache, type TokenSink } from './words.ts'

export interface UnigramOptions {
  /** Text and log probability of each piece, by id. */
  pieces: readonly (readonly [text: string, score: number])[]
  unknown: number | undefined
  byteFallback: boolean
}

/** How far below the worst piece an unknown character scores, as SentencePiece has it. */
const UNKNOWN_PENALTY = 10

export class Unigram implements PieceModel {
  readonly #options: UnigramOptions
  readonly #ids = new Map<string, number>()
  readonly #unknownScore: number
  readonly #cache = new WordCache()
  /** A trie over UTF-16 code units: (node, unit) → next node; node 0 is the root. */
  readonly #edges: PairTable
  /** The piece that ends at a node, -1 for none. */
  readonly #ends: number[] = [-1]

  constructor(options: UnigramOptions) {
    this.#options = options
    this.#edges = new PairTable(options.pieces.length * 2)
    let lowest = Infinity
    options.pieces.forEach(([text, score], id) => {
      this.#ids.set(text, id)
      lowest = Math.min(lowest, score)
      this.#insert(text, id)
    })
    this.#unknownScore = lowest - UNKNOWN_PENALTY
  }

  encode(piece: string, out: TokenSink): void {
    this.#cache.encode(piece, this.#encodePiece, out)
  }

  #insert(text: string, id: number): void {
    let node = 0
    for (let i = 0; i < text.length; i++) {
      const slot = this.#edges.find(node, text.charCodeAt(i))
      if (slot >= 0) {
        node = this.#edges.merged(slot)
        continue
      }
      const fresh = this.#ends.push(-1) - 1
      this.#edges.set(node, text.charCodeAt(i), 0, fresh)
      node = fresh
    }
    if (node !== 0) this.#ends[node] = id
  }

  readonly #encodePiece = (text: string, out: TokenSink): void => {
    const { pieces, unknown } = this.#options
    const size = text.length
    // Best path to each position: its score, where its last piece starts, and which piece it is.
    const score = new Float64Array(size + 1).fill(-Infinity)
    const start = new Int32Array(size + 1).fill(-1)
    const id = new Int32Array(size + 1)
    score[0] = 0
    const offer = (from: number, to: number, piece: number, pieceScore: number): void => {
      const total = score[from]! + pieceScore
      if (start[to]! >= 0 && total <= score[to]!) return
      score[to] = total
      start[to] = from
      id[to] = piece
    }
    for (let from = 0; from < size;) {
      const width = text.codePointAt(from)! > 0xffff ? 2 : 1
      let covered = false
      let node = 0
      for (let at = from; at < size; at++) {
        const slot = this.#edges.find(node, text.charCodeAt(at))
        if (slot < 0) break
        node = this.#edges.merged(slot)
        const piece = this.#ends[node]!
        if (piece < 0) continue
        if (at + 1 - from === width) covered = true
        offer(from, at + 1, piece, pieces[piece]![1])
      }
      if (!covered) offer(from, from + width, unknown ?? -1, this.#unknownScore)
      from += width
    }
    this.#collect(text, start, id, out)
  }

  /** Walks the best path back; neighbouring unknown pieces become one. */
  #collect(text: string, start: Int32Array, id: Int32Array, out: TokenSink): void {
    const { unknown } = this.#options
    const cuts: [from: number, to: number][] = []
    let previousUnknown = false
    for (let to = text.length; to > 0; to = start[to]!) {
      const isUnknown = id[to] === (unknown ?? -1)
      const last = cuts.at(-1)
      if (isUnknown && previousUnknown && last !== undefined) last[0] = start[to]!
      else cuts.push([start[to]!, to])
      previousUnknown = isUnknown
    }
    for (const [from, to] of cuts.reverse()) this.#emit(text.slice(from, to), out)
  }

  #emit(piece: string, out: TokenSink): void {
    const { byteFallback, unknown } = this.#options
    const id = this.#ids.get(piece)
    if (id !== undefined) {
      out.push(id)
      return
    }
    const bytes = byteFallback
      ? Array.from(Buffer.from(piece, 'utf8'), (byte) => this.#ids.get(byteEntry(byte)))
      : [undefined]
    if (bytes.every((token) => token !== undefined)) {
      for (const token of bytes) out.push(token)
    } else if (unknown === undefined) {
      throw new LatticeError(
        'tokenizer_invalid',
        `The vocabulary has neither a piece nor an unknown token for ${JSON.stringify(piece)}.`,
        { todo: 'The tokenizer.json lacks unk_id; use the file that came with the model.' },
      )
    } else {
      out.push(unknown)
    }
  }
}
