// Owns the inner loop of finding stretches of text that are known, as WebAssembly: eight bytes are
// looked at, hashed and compared at a time, so that a word takes two loads instead of two loops.
//
//   0        what `scan` says when it stops           64       the table of slots
//   ARENA    what has no room in a slot               TEXT     bytes; one before, 16 zeros behind
//   TOKENS   the tokens of what was known

import * as w from '../wasm.ts'

/** Longer stretches are rarely seen twice; in bytes of UTF-8. */
export const STRETCH_MAX = 127
/** Slots are looked at no further than this, so that chosen text cannot make a search long. */
const PROBES = 16

/**
 * A slot: hash; sizes; the first 8 bytes. Sizes are how many bytes (7 bits), how many tokens (7
 * bits), and the token itself if it is one of up to 8 bytes, else where in the arena the other
 * bytes and then the tokens lie, in words.
 */
export const SLOT_BYTES = 16
export const SLOTS = 1 << 17
export const TABLE_AT = 64
export const ARENA_AT = TABLE_AT + SLOTS * SLOT_BYTES
export const ARENA_WORDS = 1 << 18
export const TEXT_AT = ARENA_AT + ARENA_WORDS * 4 + 64
/** Bytes of text at a time. */
export const TEXT_BYTES = 1 << 15
export const TOKENS_AT = TEXT_AT + TEXT_BYTES + 64
const PAGES = Math.ceil((TOKENS_AT + TEXT_BYTES * 4) / 65_536)

/** Where `scan` says: where the stretch ends, its hash, its slot (0: nowhere), the tokens' end. */
export const SAID = { end: 0, hash: 4, slot: 8, tokens: 12 } as const
export const SEED_AT = 16

export interface Scanner {
  memory: { buffer: ArrayBuffer }
  /**
   * Writes the tokens of stretches from the address `from` on to the address `out`.
   * @returns `end`, or where the first one begins that is not known
   */
  scan(from: number, end: number, out: number): number
}

const [FROM, END, OUT, AT, PLACE, BYTE, LENGTH, HASH, SLOT, PROBE, SIZES, FAR] = [
  0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,
] as const
const [WORD, MIXED, FIRST, FOUND] = [12, 13, 14, 15] as const

const MIX = 0x9e3779b97f4a7c15n
const SPACE = 32
const LINE_END = 10
const SLASH = 47

const [from, end, at, place, slot] = [FROM, END, AT, PLACE, SLOT].map(w.get) as [
  w.Code,
  w.Code,
  w.Code,
  w.Code,
  w.Code,
]
const step = (local: number, by: number) => w.set(local, w.add32(w.get(local), w.i32(by)))
const within = (byte: w.Code, low: number, past: number) =>
  w.less32(w.sub32(byte, w.i32(low)), w.i32(past - low))
const isVisible = (byte: w.Code) => within(byte, SPACE + 1, 127)
const isLetter = (byte: w.Code) => within(w.or32(byte, w.i32(32)), 97, 123)

/** The highest bit of each byte that is this one; above the lowest such byte there may be more. */
function bytesLike(byte: number): w.Code {
  const all = BigInt(byte) * 0x0101010101010101n
  const different = w.xor64(w.get(WORD), w.i64(all))
  return w.and64(
    w.and64(w.sub64(different, w.i64(0x0101010101010101n)), w.xor64(different, w.i64(-1n))),
    w.i64(0x8080808080808080n),
  )
}

/** Bytes of the last word that count: 1 to 8. */
const lastWord = (address: w.Code) =>
  w.and64(
    w.longAt(address),
    w.shr64(w.i64(-1n), w.wide64(w.sub32(w.i32(64), w.shl32(w.sub32(at, address), w.i32(3))))),
  )

/** Sets AT to the stretch's end, as `isWordCut` has it. */
const FIND_END = [
  ...w.set(AT, w.add32(from, w.i32(1))),
  ...w.block(
    w.loop(
      w.when(w.notLess32(at, end), [...w.set(AT, end), ...w.leave(2)]),
      w.set(WORD, w.longAt(at)),
      w.set(FOUND, w.or64(bytesLike(SPACE), bytesLike(LINE_END))),
      w.when(w.isZero64(w.get(FOUND)), [...step(AT, 8), ...w.leave(1)]),
      w.set(PLACE, w.add32(at, w.shr32(w.low32(w.zerosBelow64(w.get(FOUND))), w.i32(3)))),
      w.when(w.notLess32(place, end), [...w.set(AT, end), ...w.leave(2)]),
      w.set(BYTE, w.byteAt(w.sub32(place, w.i32(1)))),
      w.set(AT, w.add32(place, w.i32(1))),
      w.when(
        w.equal32(w.byteAt(place), w.i32(SPACE)),
        // A cut is before the space; else the search goes on behind it.
        w.when(
          w.when32(
            isVisible(w.get(BYTE)),
            isVisible(w.byteAt(at)),
            w.and32(
              w.or32(w.equal32(w.get(BYTE), w.i32(SPACE)), w.equal32(w.get(BYTE), w.i32(LINE_END))),
              isLetter(w.byteAt(at)),
            ),
          ),
          [...w.set(AT, place), ...w.leave(3)],
        ),
        // A cut is behind the line end.
        [
          ...w.leaveIf(
            2,
            w.and32(
              w.and32(isVisible(w.byteAt(at)), w.differ32(w.byteAt(at), w.i32(SLASH))),
              w.and32(isVisible(w.get(BYTE)), w.less32(at, end)),
            ),
          ),
        ],
      ),
      w.leave(0),
    ),
  ),
]

const mix = (word: w.Code) => [
  ...w.set(MIXED, w.times64(w.xor64(w.get(MIXED), word), w.i64(MIX))),
  ...w.set(MIXED, w.xor64(w.get(MIXED), w.shr64(w.get(MIXED), w.i64(32n)))),
]

const HASH_IT = [
  ...w.set(MIXED, w.longAt(w.i32(SEED_AT))),
  ...w.set(PLACE, from),
  ...w.block(
    w.loop(
      w.leaveIf(1, w.less32(w.sub32(at, place), w.i32(9))),
      mix(w.longAt(place)),
      step(PLACE, 8),
      w.leave(0),
    ),
  ),
  ...w.set(WORD, lastWord(place)),
  ...mix(w.get(WORD)),
  ...w.set(HASH, w.low32(w.get(MIXED))),
  ...w.set(FIRST, w.get(WORD)),
  ...w.when(w.notLess32(w.get(LENGTH), w.i32(9)), w.set(FIRST, w.longAt(from))),
]

const farAt = w.add32(w.i32(ARENA_AT), w.shl32(w.shr32(w.get(SIZES), w.i32(14)), w.i32(2)))

/** Leaves so many if the bytes behind the first eight are others; sets FAR to behind theirs. */
const compareFar = (depth: number) => [
  ...w.set(PLACE, w.add32(from, w.i32(8))),
  ...w.set(FAR, farAt),
  ...w.block(
    w.loop(
      w.leaveIf(1, w.less32(w.sub32(at, place), w.i32(9))),
      w.leaveIf(depth + 2, w.differ64(w.longAt(place), w.longAt(w.get(FAR)))),
      [...step(PLACE, 8), ...step(FAR, 8)],
      w.leave(0),
    ),
  ),
  ...w.leaveIf(depth, w.differ64(lastWord(place), w.longAt(w.get(FAR)))),
  ...step(FAR, 8),
]

const copyTokens = [
  ...w.set(PLACE, w.and32(w.shr32(w.get(SIZES), w.i32(7)), w.i32(127))),
  ...w.block(
    w.loop(
      w.leaveIf(1, w.isZero32(place)),
      w.putWord(w.get(OUT), w.wordAt(w.get(FAR))),
      [...step(OUT, 4), ...step(FAR, 4), ...step(PLACE, -1)],
      w.leave(0),
    ),
  ),
]

/** Slot after slot; what is found is written, and the next stretch begins. */
const LOOK = [
  ...w.set(SLOT, w.and32(w.get(HASH), w.i32(SLOTS - 1))),
  ...w.set(PROBE, w.i32(PROBES)),
  ...w.block(
    w.loop(
      w.set(SLOT, w.add32(w.i32(TABLE_AT), w.shl32(slot, w.i32(4)))),
      w.set(SIZES, w.wordAt(slot, 4)),
      w.leaveIf(1, w.isZero32(w.get(SIZES))),
      w.block(
        w.leaveIf(0, w.differ32(w.wordAt(slot), w.get(HASH))),
        w.leaveIf(0, w.differ32(w.and32(w.get(SIZES), w.i32(127)), w.get(LENGTH))),
        w.leaveIf(0, w.differ64(w.longAt(slot, 8), w.get(FIRST))),
        w.when(
          w.less32(w.get(LENGTH), w.i32(9)),
          w.when(
            // One token: it is in the slot.
            w.equal32(w.and32(w.get(SIZES), w.i32(127 << 7)), w.i32(1 << 7)),
            [
              ...w.putWord(w.get(OUT), w.shr32(w.get(SIZES), w.i32(14))),
              ...step(OUT, 4),
              ...w.set(FROM, at),
              // Out of all that is around, to the next stretch.
              ...w.leave(6),
            ],
            w.set(FAR, farAt),
          ),
          compareFar(1),
        ),
        copyTokens,
        w.set(FROM, at),
        w.leave(4),
      ),
      w.set(
        SLOT,
        w.and32(
          w.add32(w.shr32(w.sub32(slot, w.i32(TABLE_AT)), w.i32(4)), w.i32(1)),
          w.i32(SLOTS - 1),
        ),
      ),
      step(PROBE, -1),
      w.leaveIf(0, w.get(PROBE)),
      w.set(SLOT, w.i32(0)),
    ),
  ),
]

const BODY = [
  ...w.loop(
    w.when(w.notLess32(from, end), [
      ...w.putWord(w.i32(SAID.tokens), w.get(OUT)),
      ...w.giveBack(from),
    ]),
    FIND_END,
    w.set(LENGTH, w.sub32(at, from)),
    w.set(SLOT, w.i32(0)),
    w.block(w.leaveIf(0, w.less32(w.i32(STRETCH_MAX), w.get(LENGTH))), HASH_IT, LOOK),
  ),
  ...w.putWord(w.i32(SAID.end), at),
  ...w.putWord(w.i32(SAID.hash), w.get(HASH)),
  ...w.putWord(w.i32(SAID.slot), slot),
  ...w.putWord(w.i32(SAID.tokens), w.get(OUT)),
  ...from,
]

export function makeScanner(): Scanner {
  const { I32, I64 } = w
  const locals = [...Array.from({ length: 9 }, () => I32), I64, I64, I64, I64]
  const parameters = [I32, I32, I32]
  return w.assemble({ name: 'scan', parameters, results: [I32], locals, body: BODY }, PAGES)
}
