// Owns e4m3 in plain JavaScript, as an oracle: what a byte means, and which byte is nearest.

/** Of the non-negative bytes but the last, which is no number; they grow with their bytes. */
const VALUES = Float64Array.from({ length: 127 }, (_, byte) => {
  const [exponent, mantissa] = [byte >> 3, byte & 7]
  return exponent === 0 ? mantissa / 512 : (1 + mantissa / 8) * 2 ** (exponent - 7)
})

export const E4M3_MAX = 448

export function fromE4m3(byte: number): number {
  const size = VALUES[byte & 127] ?? Number.NaN
  return byte & 128 ? -size : size
}

/** The nearest byte, of two the even one; beyond ±448 that. */
export function toE4m3(value: number): number {
  if (Number.isNaN(value)) return 127
  const size = Math.min(Math.abs(value), E4M3_MAX)
  let [byte, end] = [0, 127]
  while (end - byte > 1) {
    const middle = (byte + end) >> 1
    if (VALUES[middle]! <= size) byte = middle
    else end = middle
  }
  const [below, above] = [size - VALUES[byte]!, (VALUES[byte + 1] ?? Infinity) - size]
  if (above < below || (above === below && byte % 2 === 1)) byte++
  return (value < 0 || Object.is(value, -0) ? 128 : 0) | byte
}

/** A row as its bytes and the scale: the largest over 448, rounded up to bfloat16. */
export function quantised(row: ArrayLike<number>): { bytes: Uint8Array; scale: number } {
  const largest = Array.from(row).reduce((most, x) => Math.max(most, Math.abs(x)), 0)
  const bits = new Uint32Array(Float32Array.of(Math.max(largest / E4M3_MAX, 2 ** -126)).buffer)
  const up = Uint32Array.of((bits[0]! + 0xffff) & 0xffff0000)
  const scale = new Float32Array(up.buffer)[0]!
  const inverse = Math.fround(1 / scale)
  return { bytes: Uint8Array.from(row, (x) => toE4m3(Math.fround(x * inverse))), scale }
}
