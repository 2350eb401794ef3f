// Owns the random numbers of sampling: a counter-based generator, so that a sequence's n-th draw
// depends on its seed and n alone, never on what runs beside it or on being preempted between.

const MULTIPLIER_0 = 0xd2511f53
const MULTIPLIER_1 = 0xcd9e8d57
const WEYL_0 = 0x9e3779b9
const WEYL_1 = 0xbb67ae85
const ROUNDS = 10

/** High 32 bits of the 64-bit product of two unsigned 32-bit integers, by 16-bit halves. */
function mulHigh(a: number, b: number): number {
  const aLow = a & 0xffff
  const aHigh = a >>> 16
  const bLow = b & 0xffff
  const bHigh = b >>> 16
  const middle = aHigh * bLow + ((aLow * bLow) >>> 16)
  const other = aLow * bHigh + (middle & 0xffff)
  return aHigh * bHigh + (middle >>> 16) + (other >>> 16)
}

/**
 * Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3",
 * SC 2011): ten rounds of multiply and swap over a 128-bit counter under a 64-bit key. A round is
 * (c0, c1, c2, c3) ← (high(M1·c2) ^ c1 ^ k0, low(M1·c2), high(M0·c0) ^ c3 ^ k1, low(M0·c0)), after
 * which k0 += 0x9e3779b9 and k1 += 0xbb67ae85, all modulo 2^32.
 *
 * @param counter four 32-bit words; replaced by the four words of output.
 */
export function philox(counter: Uint32Array, key0: number, key1: number): void {
  let c0 = counter[0]!
  let c1 = counter[1]!
  let c2 = counter[2]!
  let c3 = counter[3]!
  let k0 = key0 | 0
  let k1 = key1 | 0
  for (let round = 0; round < ROUNDS; round++) {
    const high0 = mulHigh(MULTIPLIER_0, c0)
    const high1 = mulHigh(MULTIPLIER_1, c2)
    const low0 = Math.imul(MULTIPLIER_0, c0)
    const low1 = Math.imul(MULTIPLIER_1, c2)
    c0 = (high1 ^ c1 ^ k0) >>> 0
    c1 = low1 >>> 0
    c2 = (high0 ^ c3 ^ k1) >>> 0
    c3 = low0 >>> 0
    k0 = (k0 + WEYL_0) | 0
    k1 = (k1 + WEYL_1) | 0
  }
  counter[0] = c0
  counter[1] = c1
  counter[2] = c2
  counter[3] = c3
}

const words = new Uint32Array(4)

/** A stream of uniform numbers: draw n is Philox(counter = (n, 0), key = seed). */
export class RandomStream {
  readonly #keyLow: number
  readonly #keyHigh: number
  #drawn = 0

  /** @param seed a safe integer; negative ones are taken modulo 2^64. */
  constructor(seed: number) {
    this.#keyLow = seed >>> 0
    this.#keyHigh = Math.floor(seed / 2 ** 32) >>> 0
  }

  /** The next number in [0, 1): the 53 high bits of the first two output words. */
  uniform(): number {
    words[0] = this.#drawn >>> 0
    words[1] = Math.floor(this.#drawn / 2 ** 32)
    words[2] = 0
    words[3] = 0
    this.#drawn += 1
    philox(words, this.#keyLow, this.#keyHigh)
    return ((words[0]! >>> 5) * 2 ** 26 + (words[1]! >>> 6)) / 2 ** 53
  }
}
