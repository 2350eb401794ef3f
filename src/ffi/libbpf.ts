// Owns calls into libbpf: it loads a compiled BPF object, sets its tunables, finds its maps and
// programs, attaches them by links that the kernel takes away when this process ends, and runs
// them on given packets. libbpf 1.1 suffices; it comes with iproute2.

import koffi, { type LibraryHandle } from 'koffi'
import { present } from '../assert.ts'
import { LatticeError } from '../errors.ts'
import { closeFd, mapShared, unmap, viewMemory } from './libc.ts'

const BPF_XDP = 37
const XDP_FLAGS_SKB_MODE = 2
const XDP_FLAGS_DRV_MODE = 4
const ENOENT = 2
const ENODEV = 19

/** Bytes of the verifier's words that are kept; it says most at the end. */
const LOG_BYTES = 1 << 20
const LOG_LINES = 6

/** bpf_object_open_opts of libbpf 1.1: its size, and where the log's buffer and its length are. */
const OPEN_OPTS_BYTES = 80
const OPEN_OPTS_LOG = 56

interface Natives {
  open(elf: Uint8Array, bytes: number, options: Uint8Array): number
  load(object: number): number
  close(object: number): void
  nextMap(object: number, map: number): number
  nextProgram(object: number, program: number): number
  mapName(map: number): string
  mapFd(map: number): number
  mapKeyBytes(map: number): number
  mapValueBytes(map: number): number
  mapEntries(map: number): number
  setMapEntries(map: number, entries: number): number
  initialValue(map: number, bytes: Uint8Array): number
  programName(program: number): string
  programFd(program: number): number
  programType(program: number): number
  createLink(program: number, ifindex: number, type: number, options: Uint8Array): number
  queryXdp(ifindex: number, flags: number, answer: Uint8Array): number
  programById(id: number): number
  info(fd: number, info: Uint8Array, bytes: Uint8Array): number
  lookup(fd: number, key: Uint8Array, value: Uint8Array): number
  update(fd: number, key: Uint8Array, value: Uint8Array, flags: bigint): number
  remove(fd: number, key: Uint8Array): number
  lookupBatch(
    fd: number,
    from: Uint8Array | null,
    next: Uint8Array,
    keys: Uint8Array,
    values: Uint8Array,
    count: Uint8Array,
    options: null,
  ): number
  testRun(fd: number, options: Uint8Array): number
  cpus(): number
}

let natives: Natives | undefined

function bpf(): Natives {
  if (natives) return natives
  let library: LibraryHandle
  try {
    library = koffi.load('libbpf.so.1')
  } catch (cause) {
    throw new LatticeError('backend_unavailable', 'libbpf.so.1 is not installed.', {
      todo: 'Install it: apt install libbpf1 (it comes with iproute2).',
      cause,
    })
  }
  const f = (name: string, result: string, parameters: string[]) =>
    library.func(name, result, parameters) as never
  const pointer = 'uintptr_t'
  library.func('libbpf_set_print', pointer, [pointer])(0)
  natives = {
    open: f('bpf_object__open_mem', pointer, ['const void *', 'size_t', 'const void *']),
    load: f('bpf_object__load', 'int', [pointer]),
    close: f('bpf_object__close', 'void', [pointer]),
    nextMap: f('bpf_object__next_map', pointer, [pointer, pointer]),
    nextProgram: f('bpf_object__next_program', pointer, [pointer, pointer]),
    mapName: f('bpf_map__name', 'str', [pointer]),
    mapFd: f('bpf_map__fd', 'int', [pointer]),
    mapKeyBytes: f('bpf_map__key_size', 'uint32_t', [pointer]),
    mapValueBytes: f('bpf_map__value_size', 'uint32_t', [pointer]),
    mapEntries: f('bpf_map__max_entries', 'uint32_t', [pointer]),
    setMapEntries: f('bpf_map__set_max_entries', 'int', [pointer, 'uint32_t']),
    initialValue: f('bpf_map__initial_value', pointer, [pointer, 'void *']),
    programName: f('bpf_program__name', 'str', [pointer]),
    programFd: f('bpf_program__fd', 'int', [pointer]),
    programType: f('bpf_program__type', 'int', [pointer]),
    createLink: f('bpf_link_create', 'int', ['int', 'int', 'int', 'const void *']),
    queryXdp: f('bpf_xdp_query', 'int', ['int', 'int', 'void *']),
    programById: f('bpf_prog_get_fd_by_id', 'int', ['uint32_t']),
    info: f('bpf_obj_get_info_by_fd', 'int', ['int', 'void *', 'void *']),
    lookup: f('bpf_map_lookup_elem', 'int', ['int', 'const void *', 'void *']),
    update: f('bpf_map_update_elem', 'int', ['int', 'const void *', 'const void *', 'uint64_t']),
    remove: f('bpf_map_delete_elem', 'int', ['int', 'const void *']),
    lookupBatch: f('bpf_map_lookup_batch', 'int', [
      'int',
      ...Array<string>(5).fill('void *'),
      'const void *',
    ]),
    testRun: f('bpf_prog_test_run_opts', 'int', ['int', 'void *']),
    cpus: f('libbpf_num_possible_cpus', 'int', []),
  }
  return natives
}

/** CPUs that a per-CPU map has a value for. */
export function possibleCpus(): number {
  return bpf().cpus()
}

/** One map of a loaded object. Keys and values are bytes as the C structs lie in memory. */
export class BpfMap {
  readonly name: string
  readonly fd: number
  readonly keyBytes: number
  readonly valueBytes: number
  readonly entries: number
  private viewAddress = 0
  private viewBytes = 0

  constructor(map: number) {
    const native = bpf()
    this.name = native.mapName(map)
    this.fd = native.mapFd(map)
    this.keyBytes = native.mapKeyBytes(map)
    this.valueBytes = native.mapValueBytes(map)
    this.entries = native.mapEntries(map)
  }

  /** @param value filled if the key is there; of a per-CPU map one value a CPU, padded to 8 each */
  lookup(key: Uint8Array, value: Uint8Array): boolean {
    return bpf().lookup(this.fd, key, value) === 0
  }

  /** @throws LatticeError `os_call_failed`: the map is full, or the value is refused */
  update(key: Uint8Array, value: Uint8Array): void {
    const result = bpf().update(this.fd, key, value, 0n)
    if (result < 0) throw failed('bpf_map_update_elem', -result, `map ${this.name}`)
  }

  /** False if it was not there. */
  delete(key: Uint8Array): boolean {
    return bpf().remove(this.fd, key) === 0
  }

  /**
   * Reads many items at once.
   * @param from what an earlier call has written to `next`; null begins
   * @param count of items that there is room for; replaced by how many there were
   * @returns false behind the last ones
   */
  batch(
    from: Uint8Array | null,
    next: Uint8Array,
    keys: Uint8Array,
    values: Uint8Array,
    count: Uint8Array,
  ): boolean {
    const result = bpf().lookupBatch(this.fd, from, next, keys, values, count, null)
    if (result < 0 && result !== -ENOENT) throw failed('bpf_map_lookup_batch', -result, this.name)
    return result >= 0
  }

  /** An mmapable array map as memory that the program reads and writes too; until `close`. */
  view(): ArrayBuffer {
    this.viewBytes = Math.ceil((this.valueBytes * this.entries) / 4096) * 4096
    this.viewAddress ||= mapShared(this.fd, this.viewBytes)
    return viewMemory(this.viewAddress, this.viewBytes)
  }

  /** Its memory is not mapped any more: whoever still reads it crashes. */
  close(): void {
    if (this.viewAddress) unmap(this.viewAddress, this.viewBytes)
    this.viewAddress = 0
  }
}

export interface ProgramInfo {
  id: number
  name: string
  /** Instructions that the verifier followed, of the million it allows. */
  verified: number
  /** Bytes of machine code. */
  machineBytes: number
}

function programInfo(fd: number): ProgramInfo {
  // struct bpf_prog_info
  const info = new DataView(new ArrayBuffer(232))
  const length = new Uint8Array(Uint32Array.of(232).buffer)
  const bytes = new Uint8Array(info.buffer)
  const result = bpf().info(fd, bytes, length)
  if (result < 0) throw failed('bpf_obj_get_info_by_fd', -result, `descriptor ${fd}`)
  const name = bytes.subarray(64, 80)
  const end = name.indexOf(0)
  return {
    id: info.getUint32(4, true),
    name: Buffer.from(name.subarray(0, end < 0 ? 16 : end)).toString(),
    verified: info.getUint32(216, true),
    machineBytes: info.getUint32(16, true),
  }
}

/** The XDP program of an interface as the kernel has it; undefined if there is none. */
export interface AttachedXdp {
  mode: 'native' | 'generic' | 'offloaded' | 'several'
  id: number
  /** Empty if this process may not ask. */
  name: string
}

const ATTACHED = [undefined, 'native', 'generic', 'offloaded', 'several'] as const

/** Undefined also of an interface that has vanished. @throws LatticeError `os_call_failed` */
export function attachedXdp(ifindex: number): AttachedXdp | undefined {
  // struct bpf_xdp_query_opts
  const answer = new DataView(new ArrayBuffer(32))
  answer.setBigUint64(0, 32n, true)
  const result = bpf().queryXdp(ifindex, 0, new Uint8Array(answer.buffer))
  if (result === -ENODEV) return undefined
  if (result < 0) throw failed('bpf_xdp_query', -result, `interface ${ifindex}`)
  const mode = ATTACHED[answer.getUint8(24)]
  if (!mode) return undefined
  const id = [8, 12, 16, 20].map((at) => answer.getUint32(at, true)).find((found) => found) ?? 0
  const fd = bpf().programById(id)
  if (fd < 0) return { mode, id, name: '' }
  const { name } = programInfo(fd)
  closeFd(fd)
  return { mode, id, name }
}

/** What running a program on a packet came to. */
export interface TestRun {
  /** XDP_ABORTED 0, DROP 1, PASS 2, TX 3, REDIRECT 4; of tc NEXT −1, DROP 2. */
  action: number
  packet: Uint8Array
  /** Mean of the repeats. */
  durationNs: number
  /** struct __sk_buff after a tc program; empty after others. */
  context: DataView
}

/** struct __sk_buff, or more. */
const CONTEXT_BYTES = 192
const PROG_TYPE_SCHED_CLS = 3

export class BpfProgram {
  readonly name: string
  readonly fd: number
  private readonly isTc: boolean

  constructor(program: number) {
    this.isTc = bpf().programType(program) === PROG_TYPE_SCHED_CLS
    this.name = bpf().programName(program)
    this.fd = bpf().programFd(program)
  }

  /**
   * Attaches to an interface: in its driver, or behind it with a socket buffer already built.
   * @returns a function that detaches; the kernel does if this process ends without it
   * @throws LatticeError `os_call_failed` with the kernel's `details.errno`
   */
  attachXdp(ifindex: number, mode: 'native' | 'generic'): () => void {
    const options = new DataView(new ArrayBuffer(16))
    options.setBigUint64(0, 16n, true)
    options.setUint32(8, mode === 'native' ? XDP_FLAGS_DRV_MODE : XDP_FLAGS_SKB_MODE, true)
    const link = bpf().createLink(this.fd, ifindex, BPF_XDP, new Uint8Array(options.buffer))
    if (link < 0) throw failed('bpf_link_create', -link, `${this.name}, ${mode}`)
    return () => closeFd(link)
  }

  info(): ProgramInfo {
    return programInfo(this.fd)
  }

  /** BPF_PROG_TEST_RUN. A program that changes the packet sees its own change when repeated. */
  testRun(packet: Uint8Array, repeat = 1): TestRun {
    const out = new Uint8Array(4096)
    // struct bpf_test_run_opts
    const options = new DataView(new ArrayBuffer(88))
    options.setBigUint64(0, 88n, true)
    options.setBigUint64(8, BigInt(koffi.address(packet)), true)
    options.setBigUint64(16, BigInt(koffi.address(out)), true)
    options.setUint32(24, packet.length, true)
    options.setUint32(28, out.length, true)
    const context = new DataView(new ArrayBuffer(CONTEXT_BYTES))
    // For XDP it would be read as well: a packet without a byte.
    if (this.isTc) {
      options.setBigUint64(40, BigInt(koffi.address(context.buffer)), true)
      options.setUint32(52, CONTEXT_BYTES, true)
    }
    options.setInt32(60, repeat, true)
    this.run(new Uint8Array(options.buffer))
    return {
      action: options.getInt32(56, true),
      packet: out.slice(0, options.getUint32(28, true)),
      durationNs: options.getUint32(64, true),
      context: new DataView(context.buffer, 0, options.getUint32(52, true)),
    }
  }

  /**
   * The same for millions of packets: nothing is allocated for each.
   * @param packet holds each packet in turn, in its first `bytes`
   * @param out what became of it
   * @returns what runs the program and returns its action
   */
  testRunner(packet: Uint8Array, out: Uint8Array): (bytes: number) => number {
    const options = new DataView(new ArrayBuffer(88))
    const raw = new Uint8Array(options.buffer)
    return (bytes) => {
      raw.fill(0)
      options.setBigUint64(0, 88n, true)
      options.setBigUint64(8, BigInt(koffi.address(packet)), true)
      options.setBigUint64(16, BigInt(koffi.address(out)), true)
      options.setUint32(24, bytes, true)
      options.setUint32(28, out.length, true)
      options.setInt32(60, 1, true)
      this.run(raw)
      return options.getUint32(56, true)
    }
  }

  private run(options: Uint8Array): void {
    const result = bpf().testRun(this.fd, options)
    if (result < 0) throw failed('bpf_prog_test_run_opts', -result, this.name)
  }
}

/** A loaded object: its programs are verified and in the kernel, attached to nothing yet. */
export class BpfObject {
  readonly maps = new Map<string, BpfMap>()
  readonly programs = new Map<string, BpfProgram>()
  private readonly object: number

  /**
   * @param tune changes the bytes of `.rodata`, where `const volatile` tunables lie, before loading
   * @param entries of maps, by name, that are to have another number of them
   * @throws LatticeError `backend_unavailable` without libbpf or the permission, `backend_failed`
   *   with the verifier's last lines
   */
  constructor(
    elf: Uint8Array,
    tune: (rodata: Uint8Array) => void = () => {},
    entries: Readonly<Record<string, number>> = {},
  ) {
    const native = bpf()
    const log = new Uint8Array(LOG_BYTES)
    const options = new DataView(new ArrayBuffer(OPEN_OPTS_BYTES))
    options.setBigUint64(0, BigInt(OPEN_OPTS_BYTES), true)
    options.setBigUint64(OPEN_OPTS_LOG, BigInt(koffi.address(log)), true)
    options.setBigUint64(OPEN_OPTS_LOG + 8, BigInt(LOG_BYTES), true)
    this.object = native.open(elf, elf.length, new Uint8Array(options.buffer))
    if (this.object === 0) throw failed('bpf_object__open_mem', koffi.errno(), 'the object')
    this.#tune(tune, entries)
    const result = native.load(this.object)
    if (result < 0) {
      native.close(this.object)
      throw refused(-result, log)
    }
    for (let map = 0; (map = native.nextMap(this.object, map)) !== 0;) {
      const found = new BpfMap(map)
      this.maps.set(found.name, found)
    }
    for (let program = 0; (program = native.nextProgram(this.object, program)) !== 0;) {
      const found = new BpfProgram(program)
      this.programs.set(found.name, found)
    }
  }

  map(name: string): BpfMap {
    return present(this.maps.get(name), `the map ${name}`)
  }

  program(name: string): BpfProgram {
    return present(this.programs.get(name), `the program ${name}`)
  }

  close(): void {
    for (const map of this.maps.values()) map.close()
    bpf().close(this.object)
  }

  #tune(tune: (rodata: Uint8Array) => void, entries: Readonly<Record<string, number>>): void {
    const native = bpf()
    for (let map = 0; (map = native.nextMap(this.object, map)) !== 0;) {
      const count = entries[native.mapName(map)]
      if (count !== undefined) native.setMapEntries(map, count)
      if (!native.mapName(map).endsWith('.rodata')) continue
      const address = native.initialValue(map, new Uint8Array(8))
      tune(new Uint8Array(viewMemory(address, native.mapValueBytes(map))))
    }
  }
}

function failed(call: string, errno: number, what: string): LatticeError {
  return new LatticeError('os_call_failed', `${call} failed with errno ${errno}: ${what}.`, {
    details: { call, errno },
  })
}

const EPERM = 1

function refused(errno: number, log: Uint8Array): LatticeError {
  if (errno === EPERM) {
    return new LatticeError('backend_unavailable', 'The kernel allows no BPF programs here.', {
      todo: 'Run as root, or with CAP_BPF and CAP_NET_ADMIN.',
    })
  }
  const text = Buffer.from(log.subarray(0, log.indexOf(0))).toString('utf8')
  const last = text.trimEnd().split('\n').slice(-LOG_LINES).join('\n')
  return new LatticeError('backend_failed', `The verifier refused a program:\n${last}`, {
    details: { errno },
  })
}
