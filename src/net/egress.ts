// Owns the control plane of egress: it loads the program that accounts for answers as they leave,
// tells it how a tenant is paced and marked, and reads what it has counted. bpf/egress.bpf.c
// decides about a frame.

import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { LatticeError } from '../errors.ts'
import { ATTACH, attachLink } from '../ffi/bpf-link.ts'
import { BpfObject, type BpfProgram } from '../ffi/libbpf.ts'
import { interfaceIndex } from '../ffi/xdp-socket.ts'
import { refused } from './interface.ts'
import { PROTOCOL_PORT, TENANTS_MAX } from './protocol.ts'

/** struct tenant_out */
const TENANT_OUT = {
  bytes: 128,
  nsPerByte1024: 0,
  nextNs: 8,
  dscp: 16,
  datagrams: 24,
  wireBytes: 32,
  tokens: 40,
  repeats: 48,
  ended: 56,
  overdue: 64,
} as const

/** struct answer_key and struct answer */
const ANSWER_KEY_BYTES = 16
const ANSWER_BYTES = 48

export interface EgressPolicy {
  /** 0 is the highest; undefined leaves frames unmarked. */
  priority: 0 | 1 | 2 | 3 | undefined
  /** Of frames; 0 is not paced. Needs the queue discipline `fq`, which holds frames back. */
  bytesPerSecond: number
}

/**
 * DSCP by priority (RFC 4594): interactive is assured forwarding 41 to 21, the last is for what may
 * wait (RFC 8622's lower effort).
 */
export const DSCP_OF_PRIORITY = [34, 26, 18, 1] as const

export interface TenantAccount {
  datagrams: number
  /** Of whole frames. */
  bytes: number
  /** Each once, however often it was sent. */
  tokens: number
  /** TOKENS and END that were sent before. */
  repeats: number
  ended: number
  /** Dropped because they would have had to wait for too long. */
  overdue: number
}

export interface RequestAccount {
  datagrams: number
  bytes: number
  tokens: number
  repeats: number
  ended: boolean
  /** Of its END. */
  code: number
}

export class Egress {
  readonly program: BpfProgram
  private readonly object: BpfObject
  private readonly tenants: DataView
  private paced = false

  /** @throws LatticeError as `BpfObject` does */
  constructor(elf: Uint8Array, port = PROTOCOL_PORT) {
    this.object = new BpfObject(elf, (rodata) => {
      new DataView(rodata.buffer, rodata.byteOffset).setUint16(0, port, true)
    })
    this.program = this.object.program('egress')
    this.tenants = new DataView(this.object.map('tenants_out').view())
  }

  /** The compiled program that comes with the package. */
  static load(port?: number): Egress {
    return new Egress(readFileSync(new URL('../../bpf/egress.o', import.meta.url)), port)
  }

  /** @throws LatticeError `invalid_request` for numbers out of bounds */
  setTenant(index: number, { priority, bytesPerSecond }: EgressPolicy): void {
    if (!Number.isInteger(index) || index < 0 || index >= TENANTS_MAX) {
      throw new LatticeError('invalid_request', `Tenant ${index} is not one of ${TENANTS_MAX}.`)
    }
    if (bytesPerSecond !== 0 && !(bytesPerSecond >= 1000 && bytesPerSecond <= 1e11)) {
      throw new LatticeError('invalid_request', `A pace of ${bytesPerSecond} bytes a second.`, {
        todo: 'Use 1,000 to 100,000,000,000, or 0 for none.',
      })
    }
    const at = index * TENANT_OUT.bytes
    const price = bytesPerSecond === 0 ? 0 : Math.max(1, Math.round((1e9 * 1024) / bytesPerSecond))
    this.paced ||= price > 0
    const dscp = priority === undefined ? 0 : DSCP_OF_PRIORITY[priority]
    this.tenants.setUint32(at + TENANT_OUT.dscp, dscp, true)
    this.tenants.setBigUint64(at + TENANT_OUT.nsPerByte1024, BigInt(price), true)
  }

  /**
   * Attaches to what an interface sends, behind other programs that are there.
   * @returns a function that detaches; the kernel does if this process ends without it
   * @throws LatticeError `net_refused` if a tenant is paced and nothing there would hold frames
   *   back, `os_call_failed`
   */
  attach(interfaceName: string): () => void {
    if (this.paced && !heldByFq(interfaceName)) {
      throw refused(
        `A tenant is paced (bytes_per_second), but nothing on ${interfaceName} holds frames back.`,
        `tc qdisc replace dev ${interfaceName} root fq — where the kernel has it (sch_fq); or ` +
          'pace no tenant.',
      )
    }
    return attachLink(this.program.fd, interfaceIndex(interfaceName), ATTACH.tcxEgress)
  }

  tenant(index: number): TenantAccount {
    const read = (at: number) => {
      return Number(this.tenants.getBigUint64(index * TENANT_OUT.bytes + at, true))
    }
    return {
      datagrams: read(TENANT_OUT.datagrams),
      bytes: read(TENANT_OUT.wireBytes),
      tokens: read(TENANT_OUT.tokens),
      repeats: read(TENANT_OUT.repeats),
      ended: read(TENANT_OUT.ended),
      overdue: read(TENANT_OUT.overdue),
    }
  }

  /** Undefined if nothing of it was sent yet, or so long ago that others took its place. */
  request(tenant: number, request: bigint): RequestAccount | undefined {
    const key = new DataView(new ArrayBuffer(ANSWER_KEY_BYTES))
    // As it comes over the wire.
    key.setBigUint64(0, request)
    key.setUint32(8, tenant, true)
    const value = new DataView(new ArrayBuffer(ANSWER_BYTES))
    const bytes = new Uint8Array(value.buffer)
    if (!this.object.map('answers').lookup(new Uint8Array(key.buffer), bytes)) return undefined
    const [datagrams, wireBytes, tokens, repeats] = [0, 8, 16, 24].map((at) =>
      Number(value.getBigUint64(at, true)),
    ) as [number, number, number, number]
    const ended = value.getUint32(40, true) !== 0
    return { datagrams, bytes: wireBytes, tokens, repeats, ended, code: value.getUint32(44, true) }
  }

  close(): void {
    this.object.close()
  }
}

/** fq, and nothing else in the kernel's tree, sends a frame at the time that is written on it. */
function heldByFq(interfaceName: string): boolean {
  let text: string
  try {
    text = execFileSync('tc', ['-j', 'qdisc', 'show', 'dev', interfaceName], { encoding: 'utf8' })
  } catch (cause) {
    throw refused(
      'A tenant is paced (bytes_per_second), and `tc`, which says what holds frames back, fails.',
      'Install it: apt install iproute2; or pace no tenant.',
      cause,
    )
  }
  const qdiscs = JSON.parse(text) as { kind: string }[]
  return qdiscs.some(({ kind }) => kind === 'fq')
}
