// Owns the way through Ethernet, VLAN, IP and UDP of a frame that the ingress program let through,
// and the frames that go back to where one came from.

import { HEADER_BYTES } from './protocol.ts'

/** Where things lie in a frame, from its first byte on. */
export interface FrameLayout {
  ip: number
  version: 4 | 6
  udp: number
  /** Of the datagram: header and payload. */
  data: number
  dataBytes: number
}

const ETHERTYPE_IPV4 = 0x0800
const ETHERTYPE_VLAN = 0x8100
const ETHERTYPE_SERVICE_VLAN = 0x88a8
const UDP_BYTES = 8

/** The program has checked it all; a frame that is too short for its own words is undefined. */
export function layoutOf(view: DataView, at: number, bytes: number): FrameLayout | undefined {
  let ip = at + 14
  let type = view.getUint16(at + 12)
  while (type === ETHERTYPE_VLAN || type === ETHERTYPE_SERVICE_VLAN) {
    type = view.getUint16(ip + 2)
    ip += 4
  }
  const version = type === ETHERTYPE_IPV4 ? 4 : 6
  const udp = ip + (version === 4 ? (view.getUint8(ip) & 15) * 4 : 40)
  const dataBytes = view.getUint16(udp + 4) - UDP_BYTES
  const data = udp + UDP_BYTES
  if (dataBytes < HEADER_BYTES || data + dataBytes > at + bytes) return undefined
  return { ip, version, udp, data, dataBytes }
}

/** What precedes a datagram to a peer: everything up to the UDP header, filled in but for sums. */
export class ReturnPath {
  private readonly template: Uint8Array
  private readonly ip: number
  private readonly version: 4 | 6
  private readonly udp: number

  /** @param template what precedes a datagram, its ends exchanged already; kept */
  constructor(template: Uint8Array, ip: number, version: 4 | 6) {
    this.template = template
    this.ip = ip
    this.version = version
    this.udp = template.length - UDP_BYTES
  }

  /** To where a frame came from; it is copied. */
  static of(view: DataView, at: number, layout: FrameLayout): ReturnPath {
    const { version } = layout
    const [ip, udp] = [layout.ip - at, layout.udp - at]
    const template = new Uint8Array(view.buffer, view.byteOffset + at, udp + UDP_BYTES).slice()
    swap(template, 0, 6, 6)
    const [address, bytes] = version === 4 ? [ip + 12, 4] : [ip + 8, 16]
    swap(template, address, address + bytes, bytes)
    swap(template, udp, udp + 2, 2)
    template[ip + (version === 4 ? 8 : 7)] = 64
    return new ReturnPath(template, ip, version)
  }

  /** Bytes of a frame before the datagram. */
  get headBytes(): number {
    return this.udp + UDP_BYTES
  }

  /**
   * Completes a frame whose datagram lies behind `headBytes`.
   * @param dscp the class that routers see (RFC 2474), 0 to 63
   */
  seal(frame: Uint8Array, dataBytes: number, dscp = 0): void {
    frame.set(this.template)
    const view = new DataView(frame.buffer, frame.byteOffset, this.headBytes + dataBytes)
    const udpBytes = UDP_BYTES + dataBytes
    view.setUint16(this.udp + 4, udpBytes)
    view.setUint16(this.udp + 6, 0)
    if (this.version === 4) {
      view.setUint8(this.ip + 1, dscp << 2)
      view.setUint16(this.ip + 2, this.udp - this.ip + udpBytes)
      view.setUint16(this.ip + 10, 0)
      view.setUint16(this.ip + 10, checksum(view, this.ip, this.udp - this.ip, 0))
    } else {
      view.setUint16(this.ip, 0x6000 | (dscp << 6))
      view.setUint16(this.ip + 4, udpBytes)
    }
    const [address, bytes] = this.version === 4 ? [this.ip + 12, 8] : [this.ip + 8, 32]
    const pseudo = 17 + udpBytes + (0xffff - checksum(view, address, bytes, 0))
    const sum = checksum(view, this.udp, udpBytes, pseudo)
    view.setUint16(this.udp + 6, sum === 0 ? 0xffff : sum)
  }
}

/** The Internet checksum (RFC 1071) of `bytes` bytes, beginning with a sum. */
function checksum(view: DataView, from: number, bytes: number, sum: number): number {
  let total = sum
  const even = bytes & ~1
  for (let i = 0; i < even; i += 2) total += view.getUint16(from + i)
  if (bytes > even) total += view.getUint8(from + even) << 8
  while (total > 0xffff) total = (total & 0xffff) + (total >>> 16)
  return ~total & 0xffff
}

function swap(bytes: Uint8Array, a: number, b: number, count: number): void {
  const saved = bytes.slice(a, a + count)
  bytes.copyWithin(a, b, b + count)
  bytes.set(saved, b)
}
