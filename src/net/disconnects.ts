// Owns being told by the kernel when a client's connection ends: a cgroup of its own for this
// process, the program that watches its sockets (bpf/disconnect.bpf.c), the ring that it writes.

import {
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import type { LatticeError } from '../errors.ts'
import { ATTACH, attachLink } from '../ffi/bpf-link.ts'
import { BpfObject } from '../ffi/libbpf.ts'
import { refused } from './interface.ts'

const NAME = /^lattice-(\d+)$/

export class Disconnects {
  /** Of the ring's map, for whoever reads it; any thread may, but only one. */
  readonly ring: { fd: number; bytes: number }
  private readonly object: BpfObject
  private readonly detach: () => void
  private readonly parent: string
  private readonly folder: string
  private readonly onExit = (): void => this.close()
  private closed = false

  private constructor(parent: string, object: BpfObject) {
    this.parent = parent
    this.folder = join(parent, `lattice-${process.pid}`)
    this.object = object
    const { fd, entries } = object.map('disconnects')
    this.ring = { fd, bytes: entries }
    enter(this.folder)
    const directory = openSync(this.folder, 'r')
    try {
      this.detach = attachLink(object.program('disconnect').fd, directory, ATTACH.cgroupSockOps)
    } catch (thrown) {
      leave(this.parent, this.folder)
      throw thrown
    } finally {
      closeSync(directory)
    }
    process.once('exit', this.onExit)
  }

  /**
   * Moves this process into a cgroup of its own, below the one it is in, and watches what it
   * listens on from now on. Its limits stay those of the cgroup above.
   * @param cgroup of this process, in the v2 hierarchy; where that is unless given
   * @throws LatticeError `net_refused` if there is no v2 hierarchy or it cannot be written;
   *   `backend_unavailable` without libbpf or the permission
   */
  static open(cgroup = ownCgroup()): Disconnects {
    const object = new BpfObject(readFileSync(new URL('../../bpf/disconnect.o', import.meta.url)))
    try {
      removeDead(cgroup)
      return new Disconnects(cgroup, object)
    } catch (thrown) {
      object.close()
      throw thrown
    }
  }

  /** Watches no more; this process is where it was. Who reads the ring has ended before. */
  close(): void {
    if (this.closed) return
    this.closed = true
    process.off('exit', this.onExit)
    this.detach()
    this.object.close()
    leave(this.parent, this.folder)
  }
}

/**
 * @param mounts as in /proc/self/mountinfo
 * @param cgroups as in /proc/self/cgroup
 * @throws LatticeError `net_refused`
 */
export function ownCgroup(
  mounts = readFileSync('/proc/self/mountinfo', 'utf8'),
  cgroups = readFileSync('/proc/self/cgroup', 'utf8'),
): string {
  const rows = mounts.split('\n').map((line) => line.split(' '))
  const row = rows.find((words) => words[words.indexOf('-') + 1] === 'cgroup2')
  const path = /^0::(.*)$/m.exec(cgroups)?.[1]
  if (row?.[4] !== undefined && path !== undefined) return join(row[4], path)
  throw refused(
    'There is no cgroup v2 hierarchy here, which disconnects are watched by.',
    'Mount one (mount -t cgroup2 none DIR), or leave --kernel-disconnect out.',
  )
}

function enter(folder: string): void {
  try {
    mkdirSync(folder)
    writeFileSync(join(folder, 'cgroup.procs'), String(process.pid))
  } catch (cause) {
    if (existsSync(folder)) rmdirSync(folder)
    throw notWritable(folder, cause)
  }
}

function leave(parent: string, folder: string): void {
  writeFileSync(join(parent, 'cgroup.procs'), String(process.pid))
  rmdirSync(folder)
}

/** A process that was killed leaves its cgroup behind, empty. */
function removeDead(cgroup: string): void {
  for (const name of readdirSync(cgroup)) {
    const pid = NAME.exec(name)?.[1]
    if (pid === undefined || existsSync(`/proc/${pid}`)) continue
    try {
      rmdirSync(join(cgroup, name))
    } catch {
      // Whoever is in it is of another pid namespace.
    }
  }
}

function notWritable(folder: string, cause: unknown): LatticeError {
  const why = cause instanceof Error ? cause.message : String(cause)
  return refused(
    `No cgroup can be made at ${folder}: ${why}.`,
    'Run as root with a cgroup that may be written, or leave --kernel-disconnect out.',
    cause,
  )
}
