// Owns a bad router for tests: what its kernel routes comes by here, IP packet by IP packet, to be
// lost, sent twice or held back, and goes on as it came. The seed decides what befalls the nth.

import { openSync, read, write } from 'node:fs'
import { ioctl, lastErrno } from '../../src/ffi/syscalls.ts'
import { befall, type World } from './relay.ts'

const TUNSETIFF = 0x4004_54ca
const IFF_TUN = 1
const IFF_NO_PI = 0x1000
const PACKET_BYTES = 65_536

/**
 * Makes the interface `name`, whose packets come back out of it; until the process ends.
 * @returns a function that says how many have come
 */
export function openRouter(name: string, world: World): () => number {
  const fd = openSync('/dev/net/tun', 'r+')
  // struct ifreq
  const request = new BigUint64Array(5)
  Buffer.from(request.buffer).write(name, 'latin1')
  new DataView(request.buffer).setUint16(16, IFF_TUN | IFF_NO_PI, true)
  if (ioctl(fd, TUNSETIFF, request) !== 0) throw new Error(`TUNSETIFF: errno ${lastErrno()}`)
  const pass = befall(world)
  const buffer = new Uint8Array(PACKET_BYTES)
  let count = 0
  const next = (): void => {
    read(fd, buffer, 0, PACKET_BYTES, null, (error, bytes) => {
      if (error) throw error
      count++
      const packet = buffer.slice(0, bytes)
      pass(undefined, () => write(fd, packet, (failure) => void failure))
      next()
    })
  }
  next()
  return () => count
}
