// Owns the host's KV memory: slots on a sparse memfd, mapped once. The kernel gives a page when a
// token is first written there and takes it back when the slot is released.
//
//   memfd   | slot 0 ................ | slot 1 ................ | …      (sizes are addresses)
//   pages     ##      #       ##        ###     ##      ###              (only what was written)
//
// Everyone can look: `stat -L /proc/PID/fd/N` has the blocks, smaps the mapping memfd:lattice-kv.

import { fstatSync } from 'node:fs'
import { closeFd, createMemfd, mapShared, punchHole, unmap } from '../../ffi/libc.ts'
import { type KvLayout, layerMajor, tokenMajor } from '../../kv/layout.ts'
import type { ModelConfig } from '../../model/model.ts'
import type { KvMemory } from '../backend.ts'

/** What the kernel allocates at a time in a memfd unless huge pages were asked for. */
export const HOST_PAGE_BYTES = 4096

const STAT_BLOCK_BYTES = 512

/** Where a model's keys and values (half precision) lie in slots of up to `maxTokens` tokens. */
export function hostKvLayout(
  config: ModelConfig,
  maxTokens: number,
  order: 'layer-major' | 'token-major' = 'layer-major',
): KvLayout {
  const layout = order === 'layer-major' ? layerMajor : tokenMajor
  return layout({
    layers: config.layers,
    rowBytes: 2 * config.kvHeads * config.headDim * Uint16Array.BYTES_PER_ELEMENT,
    maxTokens,
    pageBytes: HOST_PAGE_BYTES,
  })
}

export class HostKvMemory implements KvMemory {
  readonly layout: KvLayout
  readonly slots: number
  /** Address of slot 0. */
  readonly address: number
  readonly fd: number
  private readonly bytes: number

  constructor(layout: KvLayout, slots: number) {
    this.layout = layout
    this.slots = slots
    this.bytes = layout.slotBytes * slots
    this.fd = createMemfd('lattice-kv', this.bytes)
    this.address = mapShared(this.fd, this.bytes)
  }

  release(slot: number): void {
    punchHole(this.fd, slot * this.layout.slotBytes, this.layout.slotBytes)
  }

  residentBytes(): number {
    return fstatSync(this.fd).blocks * STAT_BLOCK_BYTES
  }

  close(): void {
    unmap(this.address, this.bytes)
    closeFd(this.fd)
  }
}
