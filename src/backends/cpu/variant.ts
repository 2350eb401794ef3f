// Owns choosing the build of the compute library for this CPU.

import { LatticeError } from '../../errors.ts'

export interface CpuReport {
  chosen: string
  reason: string
  candidates: { name: string; score: number; usable: boolean }[]
  features: string[]
  threads: number
  cores: string
}

export function describeCpu(): CpuReport {
  throw new LatticeError('internal', 'not built yet')
}
