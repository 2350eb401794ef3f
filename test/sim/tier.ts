// Owns the simulated disk and the pager in front of it: slow at times, failing at times, and dead
// for good once it dies.

import { LatticeError } from '../../src/errors.ts'
import { extendHash } from '../../src/backends/null/kv-memory.ts'
import { NullTier } from '../../src/backends/null/tier.ts'
import type { KvTier } from '../../src/kv/tier.ts'
import type { GpuShadow } from './gpu-shadow.ts'
import type { SimMemory } from './memory.ts'

export interface Disk {
  /** A transfer takes up to so many polls. */
  slowness: number
  /** So many transfers fail, from now on. */
  errors: number
  /** So many have failed. */
  failed: number
  dead: boolean
}

export class SimTier extends NullTier {
  readonly disk: Disk
  private readonly shadow: GpuShadow | undefined

  constructor(memory: SimMemory, capacity: number) {
    const disk: Disk = { slowness: 1, errors: 0, failed: 0, dead: false }
    super(memory, {
      capacity,
      polls: (ticket) => 1 + (extendHash(0, ticket) % disk.slowness),
      fault: () => {
        if (disk.errors === 0) return undefined
        disk.errors--
        disk.failed++
        return new LatticeError('os_call_failed', 'injected at a transfer')
      },
    })
    this.disk = disk
    this.shadow = memory.shadow
  }

  override save(...transfer: Parameters<KvTier['save']>): number {
    this.check()
    this.shadow?.transfer('save', transfer[0])
    return super.save(...transfer)
  }

  override load(...transfer: Parameters<KvTier['load']>): number {
    this.check()
    this.shadow?.transfer('load', transfer[0])
    return super.load(...transfer)
  }

  override poll(): ReturnType<KvTier['poll']> {
    if (this.disk.dead) return []
    this.shadow?.endTransfers()
    return super.poll()
  }

  override check(): void {
    if (this.disk.dead) throw new LatticeError('pager_failed', 'injected at the pager')
  }
}
