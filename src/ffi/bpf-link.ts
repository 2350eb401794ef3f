// Owns attaching programs where libbpf 1.1 cannot: links made by the system call itself. The
// kernel detaches a link when the last descriptor of it is closed, so also when a process dies.

import koffi from 'koffi'
import { LatticeError } from '../errors.ts'
import { closeFd } from './libc.ts'

const SYS_BPF = process.arch === 'arm64' ? 280 : 321
const BPF_PROG_QUERY = 16
const BPF_LINK_CREATE = 28
const ATTR_BYTES = 64

/** enum bpf_attach_type */
export const ATTACH = { cgroupSockOps: 3, tcxEgress: 47 } as const

const libc = koffi.load('libc.so.6')
const syscall = libc.func('syscall', 'int64_t', ['int64_t', 'int', 'void *', 'uint32_t'])

/**
 * Attaches a program to a target by a link.
 * @param target an interface's index for tcx, a directory's descriptor for a cgroup
 * @returns a function that detaches
 * @throws LatticeError `os_call_failed`
 */
export function attachLink(programFd: number, target: number, type: number): () => void {
  const attr = new DataView(new ArrayBuffer(ATTR_BYTES))
  attr.setUint32(0, programFd, true)
  attr.setUint32(4, target, true)
  attr.setUint32(8, type, true)
  const fd = Number(syscall(SYS_BPF, BPF_LINK_CREATE, new Uint8Array(attr.buffer), ATTR_BYTES))
  if (fd < 0) throw failed('BPF_LINK_CREATE')
  return () => closeFd(fd)
}

/**
 * How many programs are attached to a target, whoever did it.
 * @throws LatticeError `os_call_failed`
 */
export function attachedPrograms(target: number, type: number): number {
  const attr = new DataView(new ArrayBuffer(ATTR_BYTES))
  const ids = new Uint32Array(64)
  attr.setUint32(0, target, true)
  attr.setUint32(4, type, true)
  attr.setBigUint64(16, BigInt(koffi.address(ids)), true)
  attr.setUint32(24, ids.length, true)
  const bytes = new Uint8Array(attr.buffer)
  if (Number(syscall(SYS_BPF, BPF_PROG_QUERY, bytes, ATTR_BYTES)) < 0)
    throw failed('BPF_PROG_QUERY')
  return attr.getUint32(24, true)
}

function failed(call: string): LatticeError {
  const errno = koffi.errno()
  return new LatticeError('os_call_failed', `${call} failed with errno ${errno}.`, {
    details: { call, errno },
  })
}
