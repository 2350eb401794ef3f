// Owns maps and programs that other processes have loaded: finding them by their ids, which the
// kernel gives out while somebody holds them. Nothing has to be left behind in a file system.

import koffi from 'koffi'
import { LatticeError } from '../errors.ts'
import { closeFd } from './libc.ts'

const SYS_BPF = process.arch === 'arm64' ? 280 : 321
const COMMAND = {
  mapUpdate: 2,
  mapDelete: 3,
  mapNextId: 12,
  programById: 13,
  mapById: 14,
  info: 15,
} as const
const BPF_NOEXIST = 1n
const ATTR_BYTES = 64
/** struct bpf_map_info and struct bpf_prog_info begin with type and id; a map's name is at 24. */
const INFO_BYTES = 80
const MAP_NAME_AT = 24
const NAME_BYTES = 16

const libc = koffi.load('libc.so.6')
const syscall = libc.func('syscall', 'int64_t', ['int64_t', 'int', 'void *', 'uint32_t'])
const nativeSetsockopt = libc.func('setsockopt', 'int', [
  'int',
  'int',
  'int',
  'const void *',
  'uint32_t',
])

const attr = new DataView(new ArrayBuffer(ATTR_BYTES))
const attrBytes = new Uint8Array(attr.buffer)

function call(command: number, fill: () => void): number {
  attrBytes.fill(0)
  fill()
  return Number(syscall(SYS_BPF, command, attrBytes, ATTR_BYTES))
}

function address(bytes: Uint8Array): bigint {
  return BigInt(koffi.address(bytes))
}

/** Descriptors of all maps of a name, by id, lowest first; the caller closes them. */
export function mapsByName(name: string): { id: number; fd: number }[] {
  const found: { id: number; fd: number }[] = []
  for (let id = 0; ;) {
    if (call(COMMAND.mapNextId, () => attr.setUint32(0, id, true)) < 0) return found
    id = attr.getUint32(4, true)
    const fd = call(COMMAND.mapById, () => attr.setUint32(0, id, true))
    if (fd < 0) continue
    const info = infoOf(fd)
    const bytes = new Uint8Array(info.buffer, MAP_NAME_AT, NAME_BYTES)
    if (Buffer.from(bytes).toString('latin1').split('\0')[0] === name) found.push({ id, fd })
    else closeFd(fd)
  }
}

function infoOf(fd: number): DataView {
  const info = new DataView(new ArrayBuffer(INFO_BYTES))
  const result = call(COMMAND.info, () => {
    attr.setUint32(0, fd, true)
    attr.setUint32(4, INFO_BYTES, true)
    attr.setBigUint64(8, address(new Uint8Array(info.buffer)), true)
  })
  if (result < 0) throw failed('BPF_OBJ_GET_INFO_BY_FD')
  return info
}

/** Of a map or a program. */
export function idOf(fd: number): number {
  return infoOf(fd).getUint32(4, true)
}

/** @throws LatticeError `os_call_failed` if nobody holds it any more, or without CAP_SYS_ADMIN */
export function openById(kind: 'map' | 'program', id: number): number {
  const command = kind === 'map' ? COMMAND.mapById : COMMAND.programById
  const fd = call(command, () => attr.setUint32(0, id, true))
  if (fd < 0) throw failed(`opening the ${kind} ${id}`)
  return fd
}

/**
 * Puts a listening socket into a map of sockets where there is none.
 * @returns false if there is one
 */
export function placeSocket(mapFd: number, index: number, socketFd: number): boolean {
  const key = new Uint8Array(Uint32Array.of(index).buffer)
  const value = new Uint8Array(BigUint64Array.of(BigInt(socketFd)).buffer)
  const result = call(COMMAND.mapUpdate, () => {
    attr.setUint32(0, mapFd, true)
    attr.setBigUint64(8, address(key), true)
    attr.setBigUint64(16, address(value), true)
    attr.setBigUint64(24, BPF_NOEXIST, true)
  })
  if (result < 0 && koffi.errno() !== EEXIST) throw failed('BPF_MAP_UPDATE_ELEM')
  return result === 0
}

const EEXIST = 17

export function removeSocket(mapFd: number, index: number): void {
  const key = new Uint8Array(Uint32Array.of(index).buffer)
  call(COMMAND.mapDelete, () => {
    attr.setUint32(0, mapFd, true)
    attr.setBigUint64(8, address(key), true)
  })
}

const SOL_SOCKET = 1
const SO_ATTACH_REUSEPORT_EBPF = 52

/** Lets a program choose among all sockets that share this one's port. */
export function attachReuseport(socketFd: number, programFd: number): void {
  const value = Uint32Array.of(programFd)
  if (nativeSetsockopt(socketFd, SOL_SOCKET, SO_ATTACH_REUSEPORT_EBPF, value, 4) < 0) {
    throw failed('SO_ATTACH_REUSEPORT_EBPF')
  }
}

function failed(what: string): LatticeError {
  const errno = koffi.errno()
  return new LatticeError('os_call_failed', `${what} failed with errno ${errno}.`, {
    details: { call: what, errno },
  })
}
