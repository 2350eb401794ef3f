// Owns `lattice inspect gpu`: what was found for computing on a GPU, or what is missing.

import type { GpuReport, PartReport } from '../backends/cuda/describe.ts'
import { whyNotFp8 } from '../backends/cuda/quantization.ts'
import { formatBytes, formatTable } from './table.ts'

export async function inspectGpu({ json }: { json?: boolean }): Promise<void> {
  const { describeGpu } = await import('../backends/cuda/describe.ts')
  const report = describeGpu()
  process.stdout.write(json ? `${JSON.stringify(report, null, 2)}\n` : gpuText(report))
}

/** The report as lines. */
export function gpuText({ usable, parts, devices, includeFolders, kernels }: GpuReport): string {
  const lines = [usable ? 'A GPU can be used: --device cuda.' : 'No GPU can be used.', '']
  lines.push(
    formatTable(
      [{ title: 'PART' }, { title: 'VERSION' }, { title: 'WHERE' }],
      parts.map(({ title, version, path }) => [title, version ?? '-', path ?? 'missing']),
    ),
  )
  for (const { name, uuid, memoryBytes, freeBytes, ...device } of devices) {
    lines.push(
      '',
      `GPU ${device.index}: ${name}, ${uuid}`,
      `  ${formatBytes(memoryBytes)}, ${formatBytes(freeBytes)} free;` +
        ` ${device.multiprocessors} multiprocessors, L2 ${formatBytes(device.l2Bytes)},` +
        ` kernels for ${device.architecture}`,
      `  pages of the host can be mapped: ${device.hostPages ? 'yes' : 'no'}` +
        (device.hostNumaNode >= 0 ? `; nearest NUMA node ${device.hostNumaNode}` : ''),
    )
    const noFp8 = whyNotFp8(device)
    lines.push(`  fp8 (--quantization fp8): ${noFp8 === undefined ? 'yes' : `no, ${noFp8}`}`)
    if (device.problem !== undefined) lines.push(`  cannot be used: ${device.problem}`)
  }
  for (const part of parts) if (!part.found) lines.push('', ...missing(part))
  if (usable || kernels.count > 0) {
    const { count, bytes, folder } = kernels
    const kept = count === 0 ? 'none yet' : `${count}, ${formatBytes(bytes)}`
    lines.push('', `Compiled kernels: ${kept} in ${folder}; a model's first start adds its own.`)
  }
  if (includeFolders.length > 0) lines.push('', `CUDA headers: ${includeFolders.join(', ')}`)
  return `${lines.join('\n')}\n`
}

function missing({ problem, todo, looked }: PartReport): string[] {
  return [
    problem ?? '',
    ...(todo === undefined ? [] : [`  → ${todo}`]),
    ...(looked === undefined ? [] : [`  looked in ${looked.join(', ')}`]),
  ]
}
