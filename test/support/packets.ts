// Owns frames for tests of the ingress program: Ethernet, VLAN tags, IPv4 with options or IPv6,
// UDP, built here by the RFCs and checked by sums of our own.

export interface FrameShape {
  vlans?: number
  ip?: 4 | 6
  /** Bytes of IPv4 options, a multiple of 4. */
  options?: number
  /** IPv6 extension headers of 8 bytes, by their numbers. */
  extensions?: readonly number[]
  /** The 16 bits of flags and fragment offset. */
  fragment?: number
  protocol?: number
  from?: Uint8Array
  fromPort?: number
  toPort?: number
  /** Instead of the true length in the UDP header. */
  udpBytes?: number
}

export const CLIENT_4 = Uint8Array.of(10, 1, 2, 3)
export const SERVER_4 = Uint8Array.of(10, 9, 8, 7)
export const CLIENT_6 = Uint8Array.from({ length: 16 }, (_, i) => 0x20 + i)
export const SERVER_6 = Uint8Array.from({ length: 16 }, (_, i) => 0xe0 - i)
export const CLIENT_PORT = 40_000

/** Where the UDP header begins. */
export function udpOffset({ vlans = 0, ip = 4, options = 0, extensions = [] }: FrameShape): number {
  return 14 + 4 * vlans + (ip === 4 ? 20 + options : 40 + 8 * extensions.length)
}

export function frame(payload: Uint8Array, shape: FrameShape = {}): Uint8Array {
  const { vlans = 0, ip = 4, options = 0, extensions = [], fragment = 0, protocol = 17 } = shape
  const udpAt = udpOffset(shape)
  const bytes = new Uint8Array(udpAt + 8 + payload.length)
  const view = new DataView(bytes.buffer)
  bytes.set([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2])
  let at = 12
  for (let i = 0; i < vlans; i++, at += 4) {
    view.setUint16(at, i === 0 && vlans > 1 ? 0x88a8 : 0x8100)
    view.setUint16(at + 2, 100 + i)
  }
  view.setUint16(at, ip === 4 ? 0x0800 : 0x86dd)
  at += 2
  const from = shape.from ?? (ip === 4 ? CLIENT_4 : CLIENT_6)
  if (ip === 4) {
    bytes[at] = 0x40 | ((20 + options) >> 2)
    view.setUint16(at + 2, bytes.length - at)
    view.setUint16(at + 6, fragment)
    bytes[at + 8] = 64
    bytes[at + 9] = protocol
    bytes.set(from, at + 12)
    bytes.set(SERVER_4, at + 16)
    view.setUint16(at + 10, onesComplement(bytes.subarray(at, at + 20 + options)))
  } else {
    bytes[at] = 0x60
    view.setUint16(at + 4, bytes.length - at - 40)
    // Each says what follows it.
    ;[...extensions, protocol].forEach((next, i) => (bytes[at + (i === 0 ? 6 : 32 + 8 * i)] = next))
    bytes[at + 7] = 64
    bytes.set(from, at + 8)
    bytes.set(SERVER_6, at + 24)
  }
  view.setUint16(udpAt, shape.fromPort ?? CLIENT_PORT)
  view.setUint16(udpAt + 2, shape.toPort ?? 7411)
  view.setUint16(udpAt + 4, shape.udpBytes ?? 8 + payload.length)
  bytes.set(payload, udpAt + 8)
  return bytes
}

/** The Internet checksum (RFC 1071). */
export function onesComplement(...parts: Uint8Array[]): number {
  let sum = 0
  for (const part of parts) {
    for (let i = 0; i < part.length; i += 2) sum += (part[i]! << 8) | (part[i + 1] ?? 0)
  }
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16)
  return ~sum & 0xffff
}

/** 0 if the UDP checksum of a frame is right. */
export function udpChecksum(bytes: Uint8Array, shape: FrameShape = {}): number {
  const at = udpOffset(shape)
  const [addressAt, addressBytes] = (shape.ip ?? 4) === 4 ? [at - 8, 8] : [at - 32, 32]
  const options = shape.options ?? 0
  const addresses = bytes.slice(addressAt - options, addressAt - options + addressBytes)
  const length = bytes.length - at
  const pseudo = Uint8Array.of(0, 17, length >> 8, length & 255)
  return onesComplement(addresses, pseudo, bytes.subarray(at))
}
