// Owns the inner loop of finding stretches of text that are known, as WebAssembly. Where to cut is
// found for 64 bytes at once; a stretch's first 16 bytes are loaded, hashed and compared as one;
// and nothing that differs from stretch to stretch is a branch unless it is rare: a branch that is
// foretold wrong costs as much as all the rest of a stretch.
//
//   0        what `scan` says when it stops           32       constants
//   TABLE    where in the arena, by hash              ARENA    stretches and their tokens
//   TEXT     bytes; zeros before, one behind          TOKENS   the tokens of what was known

import * as w from '../wasm.ts'

/** Longer stretches are rarely seen twice; in bytes of UTF-8. */
export const STRETCH_MAX = 127
/** Slots are looked at no further than this, so that chosen text cannot make a search long. */
const PROBES = 16

/** A slot is a word: 14 bits of the hash, and where in the arena it lies, in units; 0 is none. */
export const SLOTS = 1 << 17
export const TABLE_AT = 128
export const PLACE_BITS = 18
/** A unit is 8 bytes. */
export const UNIT_BITS = 3
export const ARENA_AT = TABLE_AT + SLOTS * 4
export const ARENA_BYTES = 1 << (PLACE_BITS + UNIT_BITS)
/**
 * What lies in the arena: the first 16 bytes, filled up with zeros; sizes, which are how many bytes
 * (7 bits) and how many tokens; the tokens; the other bytes in words of 8, filled up with zeros.
 */
export const ENTRY = { sizes: 16, tokens: 20 } as const
export const KEY_BYTES = 16
/** So many tokens are copied whether there are as many or not. */
const COPIED = 8
export const TEXT_AT = ARENA_AT + ARENA_BYTES + 128
/** Bytes of text at a time. */
export const TEXT_BYTES = 1 << 15
export const TOKENS_AT = TEXT_AT + TEXT_BYTES + 128
const PAGES = Math.ceil((TOKENS_AT + TEXT_BYTES * 4 + 4 * COPIED) / 65_536)

/** Where `scan` says: where the stretch ends, its hash, its slot (0: nowhere), the tokens' end. */
export const SAID = { end: 0, hash: 4, slot: 8, tokens: 12 } as const
export const SEED_AT = 16
/** 16 bytes of ones and 16 of zeros: who loads from between them has as many ones as he likes. */
const MASKS_AT = 64
/** Written in the code, each would be put together anew in each turn of the loop. */
const BYTES_AT = 32

export interface Scanner {
  memory: { buffer: ArrayBuffer }
  /**
   * Writes the tokens of stretches from the address `from` on to the address `out`.
   * @returns `end`, or where the first one begins that is not known
   */
  scan(from: number, end: number, out: number): number
}

const [FROM, END, OUT, AT, BASE, LENGTH, HASH, SLOT, PROBE, FOUND, PLACE, SIZES, FAR] = [
  0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
] as const
const [CUTS, MIXED, SEED] = [13, 14, 15] as const
const [KEY, BEFORE, HERE] = [16, 17, 18] as const
const BYTE_LOCALS = 19

const MIX = 0x9e3779b97f4a7c15n
const [SPACE, LINE_END, SLASH, DELETE, BEFORE_A, BEHIND_Z] = [32, 10, 47, 127, 96, 123] as const
const BYTES: readonly number[] = [SPACE, LINE_END, SLASH, DELETE, BEFORE_A, BEHIND_Z]
const bytes = (byte: number) => w.get(BYTE_LOCALS + BYTES.indexOf(byte))
const LOCALS = [
  ...Array.from({ length: CUTS - AT }, () => w.I32),
  ...Array.from({ length: KEY - CUTS }, () => w.I64),
  ...Array.from({ length: BYTE_LOCALS + BYTES.length - KEY }, () => w.V128),
]

const [from, end, out, at] = [w.get(FROM), w.get(END), w.get(OUT), w.get(AT)]
const [base, length, slot, cuts] = [w.get(BASE), w.get(LENGTH), w.get(SLOT), w.get(CUTS)]
const step = (local: number, by: number) => w.set(local, w.add32(w.get(local), w.i32(by)))

const are = (vector: w.Code, byte: number) => w.equalBytes(vector, bytes(byte))
/** Bytes beyond ASCII are negative here, and so neither. */
const areVisible = (vector: w.Code) =>
  w.withoutBytes(w.greaterBytes(vector, bytes(SPACE)), are(vector, DELETE))
function areLetters(vector: w.Code): w.Code {
  // A space is also the bit by which small letters differ from capitals.
  const lower = w.orBytes(vector, bytes(SPACE))
  return w.andBytes(w.greaterBytes(lower, bytes(BEFORE_A)), w.greaterBytes(bytes(BEHIND_Z), lower))
}

/** Bits of 16 bytes from BASE on: where text is cut, as `isWordCut` has it. */
function cutsAt(offset: number): w.Code {
  const around = (by: number) => w.bytesAt(w.sub32(base, w.i32(2)), offset + 2 + by)
  const [before, here, next] = [w.get(BEFORE), w.get(HERE), around(1)]
  const spaceCuts = w.andBytes(
    are(here, SPACE),
    w.orBytes(
      w.andBytes(areVisible(before), areVisible(next)),
      w.andBytes(w.orBytes(are(before, SPACE), are(before, LINE_END)), areLetters(next)),
    ),
  )
  const lineCuts = w.andBytes(
    w.andBytes(are(before, LINE_END), areVisible(around(-2))),
    w.withoutBytes(areVisible(here), are(here, SLASH)),
  )
  return [
    ...[...w.set(BEFORE, around(-1)), ...w.set(HERE, around(0))],
    ...w.shl64(w.wide64(w.bitsOfBytes(w.orBytes(spaceCuts, lineCuts))), w.i64(BigInt(offset))),
  ]
}

const bitOfEnd = w.shl64(w.i64(1n), w.wide64(w.sub32(end, base)))

/** Sets CUTS, a bit for each of 64 bytes; behind FROM if that is among them; the end is one. */
const FIND_CUTS = [
  ...w.set(CUTS, [0, 16, 32, 48].map(cutsAt).reduce(w.or64)),
  ...w.when(
    w.notLess32(from, base),
    w.set(CUTS, w.and64(cuts, w.shl64(w.i64(-2n), w.wide64(w.sub32(from, base))))),
  ),
  ...w.when(
    w.less32(w.sub32(end, base), w.i32(64)),
    w.set(CUTS, w.or64(w.and64(cuts, w.sub64(bitOfEnd, w.i64(1n))), bitOfEnd)),
  ),
]

/** Bytes of the last word that count: 1 to 8. */
const lastWord = (address: w.Code) =>
  w.and64(
    w.longAt(address),
    w.shr64(w.i64(-1n), w.wide64(w.sub32(w.i32(64), w.shl32(w.sub32(at, address), w.i32(3))))),
  )

const mix = (word: w.Code) => [
  ...w.set(MIXED, w.times64(w.xor64(w.get(MIXED), word), w.i64(MIX))),
  ...w.set(MIXED, w.xor64(w.get(MIXED), w.shr64(w.get(MIXED), w.i64(32n)))),
]

const isLong = w.less32(w.i32(KEY_BYTES), length)

const HASH_IT = [
  ...w.set(
    KEY,
    w.andBytes(
      w.bytesAt(from),
      w.bytesAt(w.sub32(w.i32(MASKS_AT + KEY_BYTES), w.choose(isLong, w.i32(KEY_BYTES), length))),
    ),
  ),
  ...w.set(MIXED, w.get(SEED)),
  ...mix(w.halfOf(w.get(KEY), 0)),
  ...mix(w.halfOf(w.get(KEY), 1)),
  ...w.when(isLong, [
    ...w.set(PLACE, w.add32(from, w.i32(KEY_BYTES))),
    ...w.block(
      w.loop(
        w.leaveIf(1, w.less32(w.sub32(at, w.get(PLACE)), w.i32(9))),
        mix(w.longAt(w.get(PLACE))),
        step(PLACE, 8),
        w.leave(0),
      ),
    ),
    ...mix(lastWord(w.get(PLACE))),
  ]),
  ...w.set(HASH, w.low32(w.get(MIXED))),
]

const slotFor = (number: w.Code) =>
  w.add32(w.i32(TABLE_AT), w.shl32(w.and32(number, w.i32(SLOTS - 1)), w.i32(2)))

/** 0 if a slot's hash, the length and the first bytes are those that are looked for. */
const differs = w.or32(
  w.or32(
    w.shr32(w.xor32(w.wordAt(slot), w.get(HASH)), w.i32(PLACE_BITS)),
    w.and32(w.xor32(w.get(SIZES), length), w.i32(127)),
  ),
  w.anyBytes(w.xorBytes(w.bytesAt(w.get(FOUND)), w.get(KEY))),
)

const tokensOfFound = w.and32(w.shr32(w.get(SIZES), w.i32(7)), w.i32(127))

/** Leaves so many if the bytes behind the first ones are others. */
const compareFar = (depth: number) => [
  ...w.set(PLACE, w.add32(from, w.i32(KEY_BYTES))),
  ...w.set(
    FAR,
    w.add32(w.add32(w.get(FOUND), w.i32(ENTRY.tokens)), w.shl32(tokensOfFound, w.i32(2))),
  ),
  ...w.block(
    w.loop(
      w.leaveIf(1, w.less32(w.sub32(at, w.get(PLACE)), w.i32(9))),
      w.leaveIf(depth + 2, w.differ64(w.longAt(w.get(PLACE)), w.longAt(w.get(FAR)))),
      [...step(PLACE, 8), ...step(FAR, 8)],
      w.leave(0),
    ),
  ),
  ...w.leaveIf(depth, w.differ64(lastWord(w.get(PLACE)), w.longAt(w.get(FAR)))),
]

/** Leaves one if it is found, `unknown` if not; FOUND is then where, or SLOT where it may go. */
const LOOK = (unknown: number) => [
  ...w.set(SLOT, slotFor(w.get(HASH))),
  ...w.set(PROBE, w.i32(PROBES)),
  ...w.loop(
    w.set(PLACE, w.and32(w.wordAt(slot), w.i32((1 << PLACE_BITS) - 1))),
    w.set(FOUND, w.add32(w.i32(ARENA_AT), w.shl32(w.get(PLACE), w.i32(UNIT_BITS)))),
    w.set(SIZES, w.wordAt(w.get(FOUND), ENTRY.sizes)),
    w.block(w.leaveIf(0, differs), w.when(isLong, compareFar(1)), w.leave(2)),
    w.leaveIf(unknown + 1, w.isZero32(w.wordAt(slot))),
    w.set(SLOT, slotFor(w.add32(w.shr32(w.sub32(slot, w.i32(TABLE_AT)), w.i32(2)), w.i32(1)))),
    step(PROBE, -1),
    w.leaveIf(0, w.get(PROBE)),
  ),
  ...w.set(SLOT, w.i32(0)),
  ...w.leave(unknown),
]

const tokensFrom = (offset: number) => w.bytesAt(w.get(FOUND), ENTRY.tokens + offset)

const TAKE_TOKENS = [
  ...[...w.putBytes(out, tokensFrom(0)), ...w.putBytes(out, tokensFrom(16), 16)],
  ...w.set(PLACE, w.add32(out, w.shl32(tokensOfFound, w.i32(2)))),
  ...w.when(
    w.less32(w.i32(COPIED), tokensOfFound),
    w.loop(
      [...step(OUT, 16), ...step(FOUND, 16)],
      w.putBytes(out, tokensFrom(16), 16),
      w.leaveIf(0, w.less32(w.add32(out, w.i32(32)), w.get(PLACE))),
    ),
  ),
  ...w.set(OUT, w.get(PLACE)),
]

/** Out of the loop over cuts: to the next 64 bytes, or all the way to what is not known. */
const [NEXT, UNKNOWN] = [1, 4]

const EACH_CUT = w.loop(
  w.leaveIf(NEXT, w.isZero64(cuts)),
  w.set(AT, w.add32(base, w.low32(w.zerosBelow64(cuts)))),
  w.set(CUTS, w.and64(cuts, w.sub64(cuts, w.i64(1n)))),
  w.set(LENGTH, w.sub32(at, from)),
  w.set(SLOT, w.i32(0)),
  w.leaveIf(UNKNOWN, w.less32(w.i32(STRETCH_MAX), length)),
  HASH_IT,
  w.block(LOOK(UNKNOWN + 1)),
  TAKE_TOKENS,
  w.set(FROM, at),
  w.leave(0),
)

const BODY = [
  ...w.set(SEED, w.longAt(w.i32(SEED_AT))),
  ...w.set(BASE, w.and32(from, w.i32(-64))),
  ...BYTES.flatMap((_, i) => w.set(BYTE_LOCALS + i, w.sameBytesAt(w.i32(BYTES_AT), i))),
  ...w.block(
    w.block(
      w.leaveIf(0, w.notLess32(from, end)),
      w.loop(FIND_CUTS, w.block(EACH_CUT), step(BASE, 64), w.leaveIf(0, w.notLess32(end, base))),
    ),
    w.putWord(w.i32(SAID.tokens), out),
    w.giveBack(from),
  ),
  ...w.putWord(w.i32(SAID.end), at),
  ...w.putWord(w.i32(SAID.hash), w.get(HASH)),
  ...w.putWord(w.i32(SAID.slot), slot),
  ...w.putWord(w.i32(SAID.tokens), out),
  ...from,
]

export function makeScanner(): Scanner {
  const parameters = [w.I32, w.I32, w.I32]
  const scanner = w.assemble<Scanner>(
    { name: 'scan', parameters, results: [w.I32], locals: LOCALS, body: BODY },
    PAGES,
  )
  const memory = new Uint8Array(scanner.memory.buffer)
  memory.set(BYTES, BYTES_AT)
  memory.fill(255, MASKS_AT, MASKS_AT + KEY_BYTES)
  return scanner
}
