// Owns AF_XDP sockets: frames of our own memory that the kernel fills from a receive queue and
// sends from, through four rings that both sides read and write without a system call.
//
//   FILL        our free frames ──▶ kernel         RX          filled frames ──▶ us
//   TX          frames to send  ──▶ kernel         COMPLETION  sent frames   ──▶ us
//
// Documentation/networking/af_xdp.rst of the kernel. A ring is a power of two of entries between a
// producer and a consumer index that only ever grow; each side writes one of them.

import koffi from 'koffi'
import { LatticeError } from '../errors.ts'
import { mapAnonymous, unmap, viewMemory } from './libc.ts'

const AF_XDP = 44
const SOCK_RAW = 3
const SOCK_CLOEXEC = 0o2000000
const SOL_XDP = 283
const SOL_SOCKET = 1
const SO_BUSY_POLL = 46
const SO_PREFER_BUSY_POLL = 69
const SO_BUSY_POLL_BUDGET = 70
const XDP_MMAP_OFFSETS = 1
const XDP_RX_RING = 2
const XDP_TX_RING = 3
const XDP_UMEM_REG = 4
const XDP_UMEM_FILL_RING = 5
const XDP_UMEM_COMPLETION_RING = 6
const XDP_STATISTICS = 7
const XDP_OPTIONS = 8
const XDP_OPTIONS_ZEROCOPY = 1
const XDP_COPY = 2
const XDP_ZEROCOPY = 4
const XDP_USE_NEED_WAKEUP = 8
const PGOFF = { rx: 0, tx: 0x80000000, fill: 0x100000000, completion: 0x180000000 } as const
const MAP_SHARED_POPULATE = 0x8001
const MSG_DONTWAIT = 0x40

const libc = koffi.load('libc.so.6')
const native = {
  socket: libc.func('socket', 'int', ['int', 'int', 'int']),
  setsockopt: libc.func('setsockopt', 'int', ['int', 'int', 'int', 'const void *', 'uint32_t']),
  getsockopt: libc.func('getsockopt', 'int', ['int', 'int', 'int', 'void *', 'void *']),
  mmap: libc.func('mmap', 'intptr_t', ['uintptr_t', 'size_t', 'int', 'int', 'int', 'int64_t']),
  bind: libc.func('bind', 'int', ['int', 'const void *', 'uint32_t']),
  sendto: libc.func('sendto', 'int64_t', [
    'int',
    'uintptr_t',
    'size_t',
    'int',
    'uintptr_t',
    'uint32_t',
  ]),
  recvfrom: libc.func('recvfrom', 'int64_t', [
    'int',
    'uintptr_t',
    'size_t',
    'int',
    'uintptr_t',
    'uintptr_t',
  ]),
  close: libc.func('close', 'int', ['int']),
  ifindex: libc.func('if_nametoindex', 'uint32_t', ['str']),
}

export interface XdpSocketOptions {
  /** Frames for receiving and as many for sending: a power of two. */
  frames: number
  /** Bytes of each: 2048 or 4096. */
  frameBytes: number
  /** zerocopy fails where the driver has none, instead of copying after all. */
  mode: 'copy' | 'zerocopy'
  /** Packets at a time that a busy-polling caller takes from the driver; 0 is off. */
  busyPollBudget: number
}

export const XDP_SOCKET_DEFAULTS: XdpSocketOptions = {
  frames: 2048,
  frameBytes: 2048,
  mode: 'copy',
  busyPollBudget: 0,
}

/** What the kernel could not deliver or send, since the socket was opened. */
export interface XdpStatistics {
  dropped: bigint
  invalid: bigint
  ringFull: bigint
  fillEmpty: bigint
}

interface Ring {
  address: number
  /** Both indices, and whether the kernel sleeps, by their offsets in 32-bit words. */
  words: Int32Array
  producer: number
  consumer: number
  flags: number
  /** FILL and COMPLETION: one 64-bit address an entry; RX and TX: address, length, options. */
  entries: DataView
}

/** @returns 0 if there is no such interface in this network namespace */
export function interfaceIndex(name: string): number {
  return native.ifindex(name)
}

export class XdpSocket {
  readonly fd: number
  private readonly options: XdpSocketOptions
  /** The frames and the rings. */
  private readonly mapped: { address: number; bytes: number }[] = []
  private readonly bytes: Uint8Array
  private readonly view: DataView
  private readonly rings: Record<keyof typeof PGOFF, Ring>
  /** Frames for sending that the kernel does not have. */
  private readonly free: number[] = []

  /**
   * @throws LatticeError `os_call_failed`, `details.call` says which: `bind` where the queue does
   *   not exist, is taken, or the driver has no zero-copy
   */
  constructor(ifindex: number, queue: number, options: Partial<XdpSocketOptions> = {}) {
    this.options = { ...XDP_SOCKET_DEFAULTS, ...options }
    const { frames, frameBytes } = this.options
    this.fd = native.socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0)
    if (this.fd < 0) throw failed('socket', 'an AF_XDP socket; it needs CAP_NET_RAW')
    const address = mapAnonymous(2 * frames * frameBytes)
    this.mapped.push({ address, bytes: 2 * frames * frameBytes })
    const buffer = viewMemory(address, 2 * frames * frameBytes)
    this.bytes = new Uint8Array(buffer)
    this.view = new DataView(buffer)
    try {
      this.rings = this.#open(address)
      this.#bind(ifindex, queue)
    } catch (thrown) {
      this.close()
      throw thrown
    }
    for (let i = 0; i < frames; i++) this.free.push((frames + i) * frameBytes)
    this.#fill(Array.from({ length: frames }, (_, i) => i * frameBytes))
  }

  /**
   * Hands over what has arrived, `most` frames at most; a frame's bytes are valid during the call.
   * @returns how many there were
   */
  receive(take: (view: DataView, at: number, bytes: number) => void, most = 64): number {
    const { rx, fill } = this.rings
    const from = Atomics.load(rx.words, rx.consumer)
    const available = (Atomics.load(rx.words, rx.producer) - from) | 0
    const count = Math.min(available, most)
    if (count <= 0) {
      if (Atomics.load(fill.words, fill.flags) & 1) this.#wakeReceive()
      return 0
    }
    const mask = this.options.frames - 1
    const used: number[] = []
    for (let i = 0; i < count; i++) {
      const at = ((from + i) & mask) * 16
      const address = Number(rx.entries.getBigUint64(at, true))
      take(this.view, address, rx.entries.getUint32(at + 8, true))
      used.push(address - (address % this.options.frameBytes))
    }
    Atomics.store(rx.words, rx.consumer, (from + count) | 0)
    this.#fill(used)
    return count
  }

  /** Takes packets from the driver on this core, if it was opened for busy-polling. */
  poll(): void {
    this.#wakeReceive()
  }

  /** Where its frames and its rings for receiving lie, for who takes frames himself. */
  get words(): BigUint64Array {
    const { rx, fill } = this.rings
    const { frames, frameBytes } = this.options
    const memory = this.mapped[0]?.address ?? 0
    const wordAt = ({ address }: Ring, word: number): number => address + 4 * word
    const entriesOf = ({ address, entries }: Ring): number => address + entries.byteOffset
    const ofRx = [wordAt(rx, rx.producer), wordAt(rx, rx.consumer), entriesOf(rx)]
    const ofFill = [wordAt(fill, fill.producer), wordAt(fill, fill.flags), entriesOf(fill)]
    return BigUint64Array.from([this.fd, frames, frameBytes, memory, ...ofRx, ...ofFill], BigInt)
  }

  /**
   * Queues a frame; `flush` sends what is queued.
   * @returns false if all frames are on their way: flush and try again
   */
  send(write: (bytes: Uint8Array) => number): boolean {
    if (this.free.length === 0) this.#reclaim()
    const address = this.free.pop()
    if (address === undefined) return false
    const { tx } = this.rings
    const bytes = write(this.bytes.subarray(address, address + this.options.frameBytes))
    const producer = Atomics.load(tx.words, tx.producer)
    const at = (producer & (this.options.frames - 1)) * 16
    tx.entries.setBigUint64(at, BigInt(address), true)
    tx.entries.setUint32(at + 8, bytes, true)
    tx.entries.setUint32(at + 12, 0, true)
    Atomics.store(tx.words, tx.producer, (producer + 1) | 0)
    return true
  }

  /** Lets the kernel send. */
  flush(): void {
    const { tx } = this.rings
    if (Atomics.load(tx.words, tx.flags) & 1) {
      native.sendto(this.fd, 0, 0, MSG_DONTWAIT, 0, 0)
    }
    this.#reclaim()
  }

  statistics(): XdpStatistics {
    const value = new DataView(new ArrayBuffer(48))
    this.#get(XDP_STATISTICS, value, 'XDP_STATISTICS')
    const [dropped, invalid, , ringFull, fillEmpty] = [0, 8, 16, 24, 32].map((at) =>
      value.getBigUint64(at, true),
    ) as [bigint, bigint, bigint, bigint, bigint]
    return { dropped, invalid, ringFull, fillEmpty }
  }

  /** Whether the driver fills our frames itself; asked of the kernel. */
  get zeroCopy(): boolean {
    const value = word(0)
    this.#get(XDP_OPTIONS, value, 'XDP_OPTIONS')
    return (value.getUint32(0, true) & XDP_OPTIONS_ZEROCOPY) !== 0
  }

  close(): void {
    native.close(this.fd)
    for (const { address, bytes } of this.mapped.splice(0)) unmap(address, bytes)
  }

  /** Registers the frames and makes the rings. */
  #open(memory: number): Record<keyof typeof PGOFF, Ring> {
    const { frames, frameBytes } = this.options
    const umem = new DataView(new ArrayBuffer(32))
    umem.setBigUint64(0, BigInt(memory), true)
    umem.setBigUint64(8, BigInt(2 * frames * frameBytes), true)
    umem.setUint32(16, frameBytes, true)
    this.#set(SOL_XDP, XDP_UMEM_REG, umem, 'XDP_UMEM_REG')
    for (const option of [XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING, XDP_RX_RING, XDP_TX_RING]) {
      this.#set(SOL_XDP, option, word(frames), 'the size of a ring')
    }
    return this.#mapRings()
  }

  #bind(ifindex: number, queue: number): void {
    const { mode } = this.options
    this.#setBusyPoll()
    const address = new DataView(new ArrayBuffer(16))
    address.setUint16(0, AF_XDP, true)
    const copy = mode === 'copy' ? XDP_COPY : XDP_ZEROCOPY
    address.setUint16(2, copy | XDP_USE_NEED_WAKEUP, true)
    address.setUint32(4, ifindex, true)
    address.setUint32(8, queue, true)
    if (native.bind(this.fd, new Uint8Array(address.buffer), 16) < 0) {
      throw failed('bind', `an AF_XDP socket to queue ${queue} with ${mode}`)
    }
  }

  #get(option: number, value: DataView, what: string): void {
    const bytes = new Uint8Array(value.buffer)
    const length = new Uint8Array(word(bytes.length).buffer)
    if (native.getsockopt(this.fd, SOL_XDP, option, bytes, length) < 0) {
      throw failed('getsockopt', what)
    }
  }

  #set(level: number, option: number, value: DataView, what: string): void {
    const bytes = new Uint8Array(value.buffer)
    if (native.setsockopt(this.fd, level, option, bytes, bytes.length) < 0) {
      throw failed('setsockopt', what)
    }
  }

  #setBusyPoll(): void {
    const { busyPollBudget } = this.options
    if (busyPollBudget === 0) return
    this.#set(SOL_SOCKET, SO_PREFER_BUSY_POLL, word(1), 'SO_PREFER_BUSY_POLL')
    this.#set(SOL_SOCKET, SO_BUSY_POLL, word(20), 'SO_BUSY_POLL')
    this.#set(SOL_SOCKET, SO_BUSY_POLL_BUDGET, word(busyPollBudget), 'SO_BUSY_POLL_BUDGET')
  }

  #mapRings(): Record<keyof typeof PGOFF, Ring> {
    // struct xdp_mmap_offsets: rx, tx, fill, completion; each producer, consumer, entries, flags.
    const offsets = new DataView(new ArrayBuffer(128))
    this.#get(XDP_MMAP_OFFSETS, offsets, 'XDP_MMAP_OFFSETS')
    const ring = (index: number, name: keyof typeof PGOFF, entryBytes: number): Ring => {
      const [producer, consumer, entriesAt, flags] = [0, 8, 16, 24].map((at) =>
        Number(offsets.getBigUint64(index * 32 + at, true)),
      ) as [number, number, number, number]
      const bytes = entriesAt + this.options.frames * entryBytes
      const address = native.mmap(0, bytes, 3, MAP_SHARED_POPULATE, this.fd, PGOFF[name])
      if (address === -1) throw failed('mmap', `the ${name} ring`)
      this.mapped.push({ address, bytes })
      const buffer = viewMemory(address, bytes)
      return {
        address,
        words: new Int32Array(buffer, 0, bytes >> 2),
        producer: producer >> 2,
        consumer: consumer >> 2,
        flags: flags >> 2,
        entries: new DataView(buffer, entriesAt),
      }
    }
    return {
      rx: ring(0, 'rx', 16),
      tx: ring(1, 'tx', 16),
      fill: ring(2, 'fill', 8),
      completion: ring(3, 'completion', 8),
    }
  }

  /** Gives frames to the kernel; the ring is as large as there are frames, so it has room. */
  #fill(addresses: readonly number[]): void {
    const { fill } = this.rings
    const producer = Atomics.load(fill.words, fill.producer)
    const mask = this.options.frames - 1
    addresses.forEach((address, i) => {
      fill.entries.setBigUint64(((producer + i) & mask) * 8, BigInt(address), true)
    })
    Atomics.store(fill.words, fill.producer, (producer + addresses.length) | 0)
    if (Atomics.load(fill.words, fill.flags) & 1) this.#wakeReceive()
  }

  #wakeReceive(): void {
    native.recvfrom(this.fd, 0, 0, MSG_DONTWAIT, 0, 0)
  }

  /** Takes back frames that were sent. */
  #reclaim(): void {
    const { completion } = this.rings
    const from = Atomics.load(completion.words, completion.consumer)
    const count = (Atomics.load(completion.words, completion.producer) - from) | 0
    const mask = this.options.frames - 1
    for (let i = 0; i < count; i++) {
      this.free.push(Number(completion.entries.getBigUint64(((from + i) & mask) * 8, true)))
    }
    if (count > 0) Atomics.store(completion.words, completion.consumer, (from + count) | 0)
  }
}

function word(value: number): DataView {
  const view = new DataView(new ArrayBuffer(4))
  view.setUint32(0, value, true)
  return view
}

function failed(call: string, what: string): LatticeError {
  const errno = koffi.errno()
  return new LatticeError('os_call_failed', `${call} failed with errno ${errno}: ${what}.`, {
    details: { call, errno },
  })
}
