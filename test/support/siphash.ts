// Owns SipHash as the paper writes it, slowly, to compare with.

const M = (1n << 64n) - 1n

/** SipHash-2-4 as the paper writes it (Aumasson and Bernstein, 2012, section 2). */
export function referenceHash(key: Uint8Array, data: Uint8Array): bigint {
  const word = (bytes: Uint8Array) =>
    bytes.reduceRight((sum, byte) => (sum << 8n) | BigInt(byte), 0n)
  const rotate = (x: bigint, by: bigint) => ((x << by) | (x >> (64n - by))) & M
  const [k0, k1] = [word(key.subarray(0, 8)), word(key.subarray(8))]
  let v0 = k0 ^ 0x736f6d6570736575n
  let v1 = k1 ^ 0x646f72616e646f6dn
  let v2 = k0 ^ 0x6c7967656e657261n
  let v3 = k1 ^ 0x7465646279746573n
  const round = () => {
    v0 = (v0 + v1) & M
    v1 = rotate(v1, 13n) ^ v0
    v0 = rotate(v0, 32n)
    v2 = (v2 + v3) & M
    v3 = rotate(v3, 16n) ^ v2
    v0 = (v0 + v3) & M
    v3 = rotate(v3, 21n) ^ v0
    v2 = (v2 + v1) & M
    v1 = rotate(v1, 17n) ^ v2
    v2 = rotate(v2, 32n)
  }
  const padded = new Uint8Array((data.length & ~7) + 8)
  padded.set(data)
  padded[padded.length - 1] = data.length & 255
  for (let i = 0; i < padded.length; i += 8) {
    const m = word(padded.subarray(i, i + 8))
    v3 ^= m
    round()
    round()
    v0 ^= m
  }
  v2 ^= 0xffn
  for (let i = 0; i < 4; i++) round()
  return v0 ^ v1 ^ v2 ^ v3
}
