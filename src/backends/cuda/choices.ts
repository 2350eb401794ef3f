// Owns a file of what was measured to be fastest on this machine, by what it was measured for.

import { randomUUID } from 'node:crypto'
import { mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import type { GpuDevice } from '../../ffi/cuda.ts'

export class Choices<T = string> {
  private readonly path: string
  private readonly kept: Record<string, T>
  private unsaved = false

  /** @param path of a file that may be deleted at any time */
  constructor(path: string) {
    this.path = path
    this.kept = readKept(path)
  }

  get(key: string): T | undefined {
    return this.kept[key]
  }

  set(key: string, choice: T): void {
    this.kept[key] = choice
    this.unsaved = true
  }

  /** Writes what was measured, whole or not at all; if it cannot be kept it is measured again. */
  save(): void {
    if (!this.unsaved) return
    const partial = `${this.path}.${randomUUID()}`
    try {
      mkdirSync(dirname(this.path), { recursive: true })
      writeFileSync(partial, JSON.stringify(this.kept))
      renameSync(partial, this.path)
    } catch {
      // The kernels lie in the same folder, and whoever keeps them says why that fails.
    }
    this.unsaved = false
  }
}

/** Of a file for one kind of GPU, driver and library. */
export function choicesPath(
  folder: string,
  name: string,
  device: GpuDevice,
  ...versions: readonly number[]
): string {
  const machine = [device.name, device.multiprocessors, ...versions].join('-')
  return join(folder, `${name}-${machine.replaceAll(/[^\w.-]+/g, '-')}.json`)
}

function readKept<T>(path: string): Record<string, T> {
  try {
    return JSON.parse(readFileSync(path, 'utf8')) as Record<string, T>
  } catch {
    // Not there or not whole: everything is measured again.
    return {}
  }
}
