// Owns sending whole frames through the kernel's stack: a packet socket, whose frames pass tc and
// the queue discipline on their way to the driver. AF_XDP's do not, so nothing could account for
// them. What is queued leaves in one system call.

import koffi from 'koffi'
import { LatticeError } from '../errors.ts'
import { mapAnonymous, unmap, viewMemory } from './libc.ts'

const AF_PACKET = 17
const SOCK_RAW = 3
const SOCK_CLOEXEC = 0o2000000
const SOL_SOCKET = 1
const SO_SNDBUFFORCE = 32
/** A burst of a thousand frames with the kernel's bookkeeping. */
const SEND_BUFFER_BYTES = 4 << 20

const FRAME_BYTES = 2048
/** Frames a system call; what it costs is spread over so many. */
const BATCH = 64
/** struct mmsghdr, struct iovec */
const MESSAGE_BYTES = 64
const IOVEC_BYTES = 16
const IOVECS_AT = BATCH * MESSAGE_BYTES
const FRAMES_AT = 8192

const libc = koffi.load('libc.so.6')
const native = {
  socket: libc.func('socket', 'int', ['int', 'int', 'int']),
  setsockopt: libc.func('setsockopt', 'int', ['int', 'int', 'int', 'const void *', 'uint32_t']),
  bind: libc.func('bind', 'int', ['int', 'const void *', 'uint32_t']),
  sendmmsg: libc.func('sendmmsg', 'int', ['int', 'uintptr_t', 'uint', 'int']),
  close: libc.func('close', 'int', ['int']),
}

export class PacketSocket {
  /** Frames that the kernel had no room for; what they carried is sent again when it is missed. */
  lost = 0
  readonly fd: number
  private readonly memory: number
  private readonly bytes: Uint8Array
  private readonly view: DataView
  private queued = 0

  /** @throws LatticeError `os_call_failed`: it needs CAP_NET_RAW */
  constructor(ifindex: number) {
    // Protocol 0 receives nothing.
    this.fd = native.socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0)
    if (this.fd < 0) throw failed('socket', 'a packet socket; it needs CAP_NET_RAW')
    const size = Uint32Array.of(SEND_BUFFER_BYTES)
    native.setsockopt(this.fd, SOL_SOCKET, SO_SNDBUFFORCE, size, 4)
    // struct sockaddr_ll
    const address = new DataView(new ArrayBuffer(20))
    address.setUint16(0, AF_PACKET, true)
    address.setInt32(4, ifindex, true)
    if (native.bind(this.fd, new Uint8Array(address.buffer), 20) < 0) {
      const thrown = failed('bind', `a packet socket to interface ${ifindex}`)
      native.close(this.fd)
      throw thrown
    }
    const bytes = FRAMES_AT + BATCH * FRAME_BYTES
    this.memory = mapAnonymous(bytes)
    const buffer = viewMemory(this.memory, bytes)
    this.bytes = new Uint8Array(buffer)
    this.view = new DataView(buffer)
    for (let i = 0; i < BATCH; i++) {
      const iovec = IOVECS_AT + i * IOVEC_BYTES
      const frame = this.memory + FRAMES_AT + i * FRAME_BYTES
      this.view.setBigUint64(iovec, BigInt(frame), true)
      this.view.setBigUint64(i * MESSAGE_BYTES + 16, BigInt(this.memory + iovec), true)
      this.view.setBigUint64(i * MESSAGE_BYTES + 24, 1n, true)
    }
  }

  /** Queues a frame that `write` fills and measures; `flush` sends what is queued. */
  send(write: (frame: Uint8Array) => number): void {
    if (this.queued === BATCH) this.flush()
    const at = FRAMES_AT + this.queued * FRAME_BYTES
    const bytes = write(this.bytes.subarray(at, at + FRAME_BYTES))
    this.view.setUint32(IOVECS_AT + this.queued * IOVEC_BYTES + 8, bytes, true)
    this.queued++
  }

  flush(): void {
    let from = 0
    while (from < this.queued) {
      const left = this.queued - from
      const sent = native.sendmmsg(this.fd, this.memory + from * MESSAGE_BYTES, left, 0)
      // The first of them failed: as on any network, a frame may be lost.
      if (sent <= 0) this.lost++
      from += Math.max(1, sent)
    }
    this.queued = 0
  }

  close(): void {
    native.close(this.fd)
    unmap(this.memory, this.bytes.length)
  }
}

function failed(call: string, what: string): LatticeError {
  const errno = koffi.errno()
  return new LatticeError('os_call_failed', `${call} failed with errno ${errno}: ${what}.`, {
    details: { call, errno },
  })
}
