// Owns one server's place among several that listen on the same port of this machine: it says how
// much it has to do, and the kernel gives a new connection to who has the least
// (bpf/steer.bpf.c). What they share lives as long as one of them does.

import { readFileSync, statSync } from 'node:fs'
import { LatticeError } from '../errors.ts'
import {
  attachReuseport,
  idOf,
  mapsByName,
  openById,
  placeSocket,
  removeSocket,
} from '../ffi/bpf-objects.ts'
import { closeFd, mapShared, unmap, viewMemory } from '../ffi/libc.ts'
import { BpfObject } from '../ffi/libbpf.ts'

export const LISTENERS_MAX = 16
const ABSENT = -1
const MAP_BYTES = 4096
const MAGIC = 0x4c54_5354
/** struct loads, in 32-bit words behind those of the listeners. */
const WORD = { magic: 16, port: 17, namespace: 18, listeners: 20, program: 21 } as const

interface Shared {
  loadsFd: number
  address: number
  loads: Int32Array
}

export class Steering {
  readonly slot: number
  private readonly shared: Shared
  private readonly listenersFd: number
  private left = false

  private constructor(shared: Shared, listenersFd: number, slot: number) {
    this.shared = shared
    this.listenersFd = listenersFd
    this.slot = slot
    this.setLoad(0)
  }

  /**
   * Joins those that listen on a port of this network namespace, or is the first.
   * @param socketFd of a socket that listens with SO_REUSEPORT
   * @throws LatticeError `queue_full` if there are 16; as `BpfObject` does
   */
  static join(socketFd: number, port: number): Steering {
    const namespace = statSync('/proc/self/ns/net', { bigint: true }).ino
    let shared = find(port, namespace)
    if (!shared) {
      const object = create(port, namespace)
      // Whoever began at the same moment sees the same two, and takes the older one as well.
      shared = find(port, namespace)
      if (!shared) throw new LatticeError('internal', 'The map of loads has vanished.')
      join(shared, socketFd)
      object.close()
    } else join(shared, socketFd)
    const listenersFd = openById('map', shared.loads[WORD.listeners]!)
    for (let slot = 0; slot < LISTENERS_MAX; slot++) {
      if (placeSocket(listenersFd, slot, socketFd)) {
        return new Steering(shared, listenersFd, slot)
      }
    }
    throw new LatticeError('queue_full', `${LISTENERS_MAX} servers share port ${port} already.`)
  }

  /** How much there is to do: requests that run or wait. */
  setLoad(requests: number): void {
    if (!this.left) Atomics.store(this.shared.loads, this.slot, requests)
  }

  /** No new connection comes; those that are there stay. */
  leave(): void {
    if (this.left) return
    this.setLoad(ABSENT)
    this.left = true
    removeSocket(this.listenersFd, this.slot)
    closeFd(this.listenersFd)
    closeFd(this.shared.loadsFd)
    unmap(this.shared.address, MAP_BYTES)
  }
}

/** The program holds both maps, the group of sockets holds the program. */
function join({ loads }: Shared, socketFd: number): void {
  const fd = openById('program', loads[WORD.program]!)
  attachReuseport(socketFd, fd)
  closeFd(fd)
}

function create(port: number, namespace: bigint): BpfObject {
  const object = new BpfObject(readFileSync(new URL('../../bpf/steer.o', import.meta.url)))
  const loads = new Int32Array(object.map('steer_loads').view())
  loads.fill(ABSENT, 0, LISTENERS_MAX)
  loads[WORD.port] = port
  loads[WORD.listeners] = idOf(object.map('listeners').fd)
  loads[WORD.program] = idOf(object.program('steer').fd)
  new DataView(loads.buffer).setBigUint64(WORD.namespace * 4, namespace, true)
  // Last: from here on others find it.
  Atomics.store(loads, WORD.magic, MAGIC)
  return object
}

function find(port: number, namespace: bigint): Shared | undefined {
  let found: Shared | undefined
  for (const { fd } of mapsByName('steer_loads')) {
    if (found) {
      closeFd(fd)
      continue
    }
    const address = mapShared(fd, MAP_BYTES)
    const memory = viewMemory(address, MAP_BYTES)
    const loads = new Int32Array(memory)
    const itsNamespace = new DataView(memory).getBigUint64(WORD.namespace * 4, true)
    const isOurs = Atomics.load(loads, WORD.magic) === MAGIC && itsNamespace === namespace
    if (isOurs && loads[WORD.port] === port) found = { loadsFd: fd, address, loads }
    else {
      unmap(address, MAP_BYTES)
      closeFd(fd)
    }
  }
  return found
}
