// Owns going through a kernel's map, item by item, in memory that is used again.

import type { BpfMap } from './libbpf.ts'

/** Read at a time; no bucket of a hash map has more. */
const BATCH = 4096

/** Of what comes or goes meanwhile, some may be among them. */
export class MapSweep {
  /** Of many items; the current one's are at `keyAt` and `valueAt`. */
  readonly keys: DataView<ArrayBuffer>
  readonly values: DataView<ArrayBuffer>
  keyAt = 0
  valueAt = 0
  private readonly map: BpfMap
  private readonly count = new Uint32Array(1)
  private from: Uint8Array | null = null
  private at = -1
  private isLast = false

  constructor(map: BpfMap) {
    this.map = map
    this.keys = new DataView(new ArrayBuffer(BATCH * map.keyBytes))
    this.values = new DataView(new ArrayBuffer(BATCH * map.valueBytes))
  }

  /** Goes to the next item; false if there is none. @throws LatticeError `os_call_failed` */
  next(): boolean {
    const { map, count } = this
    while (++this.at >= count[0]!) {
      if (this.isLast) return false
      this.fetch()
      this.at = -1
    }
    this.keyAt = this.at * map.keyBytes
    this.valueAt = this.at * map.valueBytes
    return true
  }

  private fetch(): void {
    const next = new Uint8Array(4)
    this.count[0] = BATCH
    const [keys, values] = [new Uint8Array(this.keys.buffer), new Uint8Array(this.values.buffer)]
    this.isLast = !this.map.batch(this.from, next, keys, values, new Uint8Array(this.count.buffer))
    this.from = next
  }
}
