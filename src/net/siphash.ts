// Owns SipHash-2-4 (Aumasson and Bernstein, 2012) on this side of the wire: 64-bit words as pairs
// of 32-bit halves, because a BigInt costs ten times as much.

export interface SipKey {
  /** The key's 16 bytes as four little-endian words. */
  readonly words: Int32Array
}

/** @param bytes 16 of them */
export function sipKey(bytes: Uint8Array): SipKey {
  const view = new DataView(bytes.buffer, bytes.byteOffset, 16)
  return { words: Int32Array.from([0, 4, 8, 12], (at) => view.getInt32(at, true)) }
}

/** v0 … v3, each as its low and high half. */
const v = new Int32Array(8)

function add(a: number, b: number): void {
  const low = (v[a]! >>> 0) + (v[b]! >>> 0)
  v[a + 1] = v[a + 1]! + v[b + 1]! + (low > 0xffffffff ? 1 : 0)
  v[a] = low
}

/** a = (a rotated left by `by` bits) ^ b, for by < 32 */
function rotateXor(a: number, by: number, b: number): void {
  const low = v[a]!
  const high = v[a + 1]!
  v[a] = ((low << by) | (high >>> (32 - by))) ^ v[b]!
  v[a + 1] = ((high << by) | (low >>> (32 - by))) ^ v[b + 1]!
}

function swapHalves(a: number): void {
  const low = v[a]!
  v[a] = v[a + 1]!
  v[a + 1] = low
}

function round(): void {
  add(0, 2)
  add(4, 6)
  rotateXor(2, 13, 0)
  rotateXor(6, 16, 4)
  swapHalves(0)
  add(4, 2)
  add(0, 6)
  rotateXor(2, 17, 4)
  rotateXor(6, 21, 0)
  swapHalves(4)
}

function take(low: number, high: number): void {
  v[6] = v[6]! ^ low
  v[7] = v[7]! ^ high
  round()
  round()
  v[0] = v[0]! ^ low
  v[1] = v[1]! ^ high
}

function begin(key: SipKey): void {
  const [k0, k1, k2, k3] = key.words as unknown as [number, number, number, number]
  v[0] = k0 ^ 0x70736575
  v[1] = k1 ^ 0x736f6d65
  v[2] = k2 ^ 0x6e646f6d
  v[3] = k3 ^ 0x646f7261
  v[4] = k0 ^ 0x6e657261
  v[5] = k1 ^ 0x6c796765
  v[6] = k2 ^ 0x79746573
  v[7] = k3 ^ 0x74656462
}

/** Takes the last word in and writes the hash, big-endian. */
function finish(low: number, high: number, out: DataView, at: number): void {
  take(low, high)
  v[4] = v[4]! ^ 0xff
  for (let i = 0; i < 4; i++) round()
  out.setInt32(at, v[1]! ^ v[3]! ^ v[5]! ^ v[7]!)
  out.setInt32(at + 4, v[0]! ^ v[2]! ^ v[4]! ^ v[6]!)
}

/**
 * Writes the hash of bytes [from, to) of `data` into `out` at `at`, big-endian, as the protocol
 * has it.
 */
export function sipHash(
  key: SipKey,
  data: DataView,
  from: number,
  to: number,
  out: DataView,
  at: number,
): void {
  begin(key)
  const whole = to - ((to - from) & 7)
  for (let i = from; i < whole; i += 8) take(data.getInt32(i, true), data.getInt32(i + 4, true))
  const last = [0, (to - from) << 24]
  for (let i = whole; i < to; i++) {
    const byte = i - whole
    last[byte >> 2]! |= data.getUint8(i) << (8 * (byte & 3))
  }
  finish(last[0]!, last[1]!, out, at)
}

const saved = new Int32Array(8)
const hash = new DataView(new ArrayBuffer(8))

/**
 * Hashes of several prefixes of the same bytes, in the time of the longest.
 * @param lengths ascending, multiples of 8, no longer than the data
 */
export function sipPrefixes(key: SipKey, data: DataView, lengths: readonly number[]): bigint[] {
  begin(key)
  let at = 0
  return lengths.map((length) => {
    for (; at < length; at += 8) take(data.getInt32(at, true), data.getInt32(at + 4, true))
    saved.set(v)
    finish(0, length << 24, hash, 0)
    v.set(saved)
    return hash.getBigUint64(0)
  })
}
