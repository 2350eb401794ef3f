// Owns how a TCP connection is named by who is at its other end, so that what Node says of a socket
// and what the kernel says of it are the same word.

/** 16 bytes; IPv4 as ::ffff:a.b.c.d. A scope (%eth0) does not count. */
export function addressBytes(address: string): Uint8Array {
  if (!address.includes(':')) {
    return Uint8Array.of(...Array<number>(10).fill(0), 255, 255, ...address.split('.').map(Number))
  }
  // The last 32 bits may be written as IPv4 is.
  const four = /(.*:)(\d+)\.(\d+)\.(\d+)\.(\d+)/.exec(address)
  if (four) {
    const [, head, a, b, c, d] = four
    const hex = (high?: string, low?: string) => (Number(high) * 256 + Number(low)).toString(16)
    return addressBytes(`${head}${hex(a, b)}:${hex(c, d)}`)
  }
  const [head = '', tail] = address.replace(/%.*/, '').split('::')
  const words = (part: string) =>
    part === '' ? [] : part.split(':').map((hex) => parseInt(hex, 16))
  const [first, last] = [words(head), words(tail ?? '')]
  const gap = Array<number>(8 - first.length - last.length).fill(0)
  return Uint8Array.from([...first, ...gap, ...last].flatMap((word) => [word >> 8, word & 255]))
}

/**
 * @param address of the other end, as Node writes it
 * @example connectionKey('127.0.0.1', 4711) === connectionKey('::ffff:127.0.0.1', 4711)
 */
export function connectionKey(address: string, port: number): string {
  return keyOf(addressBytes(address), port)
}

/** The same, of 16 bytes. */
export function keyOf(address: Uint8Array, port: number): string {
  return `${Buffer.from(address).toString('hex')}:${port}`
}
