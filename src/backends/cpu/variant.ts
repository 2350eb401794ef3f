// Owns the choice of the CPU compute library: the fastest micro-architecture build that this
// machine can run, by the score each build computes from the processor's own feature bits.

import { readdirSync, readFileSync } from 'node:fs'
import { LatticeError } from '../../errors.ts'
import { extraBufferTypes, librariesFolder, loadBase, loadVariant } from '../../ffi/ggml.ts'
import { allowedCpus } from '../../ffi/libc.ts'

export interface CpuCandidate {
  name: string
  /** 0: this processor lacks an instruction set that the build uses; else higher is faster. */
  score: number
  usable: boolean
}

export interface CpuReport {
  chosen: string
  reason: string
  candidates: CpuCandidate[]
  /** Vector and matrix instruction sets of the processor that matter here. */
  features: string[]
  /** Weight layouts that the chosen build repacks to, fastest first. */
  repacking: string[]
  threads: number
  cores: string
  model: string
}

const FEATURES = [
  ...['sse4_2', 'avx', 'f16c', 'fma', 'avx2', 'avx_vnni', 'avx512f', 'avx512_vnni'],
  ...['avx512_bf16', 'avx512_fp16', 'amx_tile', 'amx_int8', 'amx_bf16'],
]

/** Every build in the package with its score on this machine, best first. */
export function rankVariants(): CpuCandidate[] {
  const names = readdirSync(librariesFolder())
    .map((file) => /^libggml-cpu-(.+)\.so$/.exec(file)?.[1])
    .filter((name) => name !== undefined)
  return names
    .map((name) => {
      const score = loadVariant(name).ggml_backend_score()
      return { name, score, usable: score > 0 }
    })
    .sort((a, b) => b.score - a.score)
}

/**
 * The name of the best build.
 * @throws LatticeError `backend_unavailable` when none runs here.
 */
export function bestVariant(): string {
  const best = rankVariants()[0]
  if (!best?.usable) {
    throw new LatticeError('backend_unavailable', 'No build of the CPU library runs here.', {
      todo: 'An x86-64 processor is needed.',
    })
  }
  return best.name
}

/** What `lattice inspect cpu` says. */
export function describeCpu(): CpuReport {
  const candidates = rankVariants()
  const chosen = bestVariant()
  const cpuInfo = readFileSync('/proc/cpuinfo', 'utf8')
  const flags = new Set(/^flags\s*:\s*(.*)$/m.exec(cpuInfo)?.[1]?.split(' ') ?? [])
  const cpus = allowedCpus()
  const g = loadBase()
  const repacking = extraBufferTypes(loadVariant(chosen)).bufferTypes.map((type) =>
    g.ggml_backend_buft_name(type),
  )
  const usable = candidates.filter((candidate) => candidate.usable).length
  return {
    chosen,
    reason:
      `highest score (${candidates[0]?.score}) of the ${usable} builds` +
      ` whose instruction sets this processor has, out of ${candidates.length}`,
    candidates,
    features: FEATURES.filter((feature) => flags.has(feature)),
    repacking,
    threads: cpus.length,
    cores: cpus.join(','),
    model: /^model name\s*:\s*(.*)$/m.exec(cpuInfo)?.[1] ?? 'unknown',
  }
}
