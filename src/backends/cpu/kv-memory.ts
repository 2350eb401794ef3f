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
import {
  copiedColumns,
  type KvColumns,
  type KvSpan,
  sharedColumns,
  spannedTokens,
} from '../../kv/regions.ts'
import type { ModelConfig } from '../../model/model.ts'
import { DiskTier, type OffloadOptions } from '../../tier/tier.ts'
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
  readonly tier?: DiskTier
  /** By slot: the region where it writes. */
  private readonly own: Int32Array
  /** By slot: which region's columns are mapped into it, all of them in order. */
  private readonly mapped: KvColumns[][]
  private readonly columns: number
  private readonly bytes: number
  private readonly scratch: number

  /** @throws LatticeError what a tier throws, if `offload` asks for one */
  constructor(layout: KvLayout, slots: number, regions = slots, offload?: OffloadOptions) {
    this.layout = layout
    this.slots = slots
    this.regions = regions
    this.bytes = layout.slotBytes * slots
    this.fd = createMemfd('lattice-kv', layout.slotBytes * regions)
    this.address = mapShared(this.fd, this.bytes)
    this.own = Int32Array.from({ length: slots }, (_, slot) => slot)
    this.columns = layout.rangeBytes / layout.shape.pageBytes
    this.mapped = Array.from({ length: slots }, (_, region) => [
      { region, first: 0, end: this.columns },
    ])
    this.scratch = mapAnonymous(layout.shape.pageBytes)
    if (offload) this.tier = new DiskTier(this, offload)
  }

  map(slot: number, region: number, shared: readonly KvSpan[]): void {
    const parts = sharedColumns(this.layout, shared)
    parts.push({ region, first: parts.at(-1)?.end ?? 0, end: this.columns })
    const changes = differingColumns(parts, this.mapped[slot] ?? [])
    this.mapped[slot] = parts
    this.own[slot] = region
    this.tier?.forget(slot)
    // One mapping for the whole slot, if that and what is put over it are fewer.
    if (changes.length * this.layout.ranges > 1 + (parts.length - 1) * this.layout.ranges) {
      const { slotBytes } = this.layout
      mapSharedAt(this.address + slot * slotBytes, slotBytes, this.fd, region * slotBytes)
      parts.slice(0, -1).forEach((part) => this.mapColumns(slot, part))
    } else for (const part of changes) this.mapColumns(slot, part)
    this.tier?.show(slot, region, parts)
  }

  copy(slot: number, first: number, shared: readonly KvSpan[]): void {
    const { ranges, rangeBytes, slotBytes, tokenStride } = this.layout
    const { pageBytes } = this.layout.shape
    const end = spannedTokens(shared) * tokenStride
    const own = (this.own[slot] ?? slot) * slotBytes
    for (const part of copiedColumns(this.layout, shared, first)) {
      // System calls do not wait for a page of the file as a touch of a mapping does.
      this.tier?.settle(part)
      const other = part.region * slotBytes
      for (let column = part.first; column < part.end; column++) {
        const start = column * pageBytes
        const bytes = Math.min(pageBytes, end - start)
        for (let at = start; at < ranges * rangeBytes; at += rangeBytes) {
          copyInFile(this.fd, own + at, other + at, bytes, this.scratch)
        }
      }
    }
  }

  private mapColumns(slot: number, { region, first, end }: KvColumns): void {
    const { ranges, rangeBytes, slotBytes } = this.layout
    const { pageBytes } = this.layout.shape
    const bytes = (end - first) * pageBytes
    for (let at = first * pageBytes; at < ranges * rangeBytes; at += rangeBytes) {
      mapSharedAt(this.address + slot * slotBytes + at, bytes, this.fd, region * slotBytes + at)
    }
  }

  discard(region: number, first: number, end: number): void {
    this.tier?.settle({ region, first, end })
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
    this.discard(this.own[slot] ?? slot, 0, this.columns)
  }

  residentBytes(): number {
    return fstatSync(this.fd).blocks * STAT_BLOCK_BYTES
  }

  close(): void {
    this.tier?.close()
    unmap(this.address, this.bytes)
    unmap(this.scratch, this.layout.shape.pageBytes)
    closeFd(this.fd)
  }
}

/** The parts of `wanted` where `present`, which covers the same columns, has another region. */
function differingColumns(
  wanted: readonly KvColumns[],
  present: readonly KvColumns[],
): KvColumns[] {
  return wanted.flatMap(({ region, first, end }) => {
    const parts: KvColumns[] = []
    for (const old of present) {
      const from = Math.max(first, old.first)
      const to = Math.min(end, old.end)
      if (from >= to || old.region === region) continue
      const last = parts.at(-1)
      if (last?.end === from) last.end = to
      else parts.push({ region, first: from, end: to })
    }
    return parts
  })
}
