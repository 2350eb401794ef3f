// Owns the host's KV memory: a sparse memfd of regions, and slots that they are mapped into. The
// kernel gives a page when a token is first written there, takes it back when it is discarded, and
// shows the same page in every slot that shares it.
//
//   memfd   | region 0 .............. | region 1 .............. | …      (sizes are addresses)
//   pages     ##      #       ##        ###     ##      ###              (only what was written)
//   slots   | slot 1 | slot 0 | slot 2: the first pages of region 0, the rest of region 3 | …
//
// Everyone can look: `stat -L /proc/PID/fd/N` has the blocks, smaps the mapping memfd:lattice-kv.

import { fstatSync } from 'node:fs'
import {
  closeFd,
  copyInFile,
  createMemfd,
  mapAnonymous,
  mapShared,
  mapSharedAt,
  punchHole,
  unmap,
} from '../../ffi/libc.ts'
import { type KvLayout, layerMajor, tokenMajor } from '../../kv/layout.ts'
import { shareableColumns, type KvSpan, sharedColumns, spannedTokens } from '../../kv/regions.ts'
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
  readonly regions: number
  /** Address of slot 0. */
  readonly address: number
  readonly fd: number
  /** By slot: the region where it writes. */
  private readonly own: Int32Array
  /** By slot: other regions are mapped into it. */
  private readonly mixed: Uint8Array
  private readonly bytes: number
  private readonly scratch: number

  constructor(layout: KvLayout, slots: number, regions = slots) {
    this.layout = layout
    this.slots = slots
    this.regions = regions
    this.bytes = layout.slotBytes * slots
    this.fd = createMemfd('lattice-kv', layout.slotBytes * regions)
    this.address = mapShared(this.fd, this.bytes)
    this.own = Int32Array.from({ length: slots }, (_, slot) => slot)
    this.mixed = new Uint8Array(slots)
    this.scratch = mapAnonymous(layout.shape.pageBytes)
  }

  map(slot: number, region: number, shared: readonly KvSpan[]): void {
    const { ranges, rangeBytes, slotBytes } = this.layout
    const { pageBytes } = this.layout.shape
    const address = this.address + slot * slotBytes
    if (this.own[slot] !== region || this.mixed[slot] === 1) {
      mapSharedAt(address, slotBytes, this.fd, region * slotBytes)
    }
    this.own[slot] = region
    const parts = sharedColumns(this.layout, shared)
    this.mixed[slot] = parts.length > 0 ? 1 : 0
    for (const part of parts) {
      const bytes = (part.end - part.first) * pageBytes
      for (let range = 0; range < ranges; range++) {
        const at = range * rangeBytes + part.first * pageBytes
        mapSharedAt(address + at, bytes, this.fd, part.region * slotBytes + at)
      }
    }
    this.copyBoundary(region, shared)
  }

  discard(region: number, first: number, end: number): void {
    const { ranges, rangeBytes, slotBytes } = this.layout
    const { pageBytes } = this.layout.shape
    const start = region * slotBytes + first * pageBytes
    const bytes = (end - first) * pageBytes
    if (bytes === rangeBytes) return punchHole(this.fd, start, slotBytes)
    for (let range = 0; range < ranges; range++) {
      punchHole(this.fd, start + range * rangeBytes, bytes)
    }
  }

  /** Gives back the whole region that a slot writes to. */
  release(slot: number): void {
    this.discard(this.own[slot] ?? slot, 0, this.layout.rangeBytes / this.layout.shape.pageBytes)
  }

  residentBytes(): number {
    return fstatSync(this.fd).blocks * STAT_BLOCK_BYTES
  }

  close(): void {
    unmap(this.address, this.bytes)
    unmap(this.scratch, this.layout.shape.pageBytes)
    closeFd(this.fd)
  }

  /** What the shared tokens have of a page that is not theirs alone; see decision 0005. */
  private copyBoundary(region: number, shared: readonly KvSpan[]): void {
    const { ranges, rangeBytes, slotBytes, tokenStride } = this.layout
    const tokens = spannedTokens(shared)
    const first = shareableColumns(this.layout, tokens) * this.layout.shape.pageBytes
    const bytes = tokens * tokenStride - first
    if (bytes === 0) return
    const from = (shared.at(-1)?.region ?? 0) * slotBytes + first
    const to = region * slotBytes + first
    for (let at = 0; at < ranges * rangeBytes; at += rangeBytes) {
      copyInFile(this.fd, to + at, from + at, bytes, this.scratch)
    }
  }
}
