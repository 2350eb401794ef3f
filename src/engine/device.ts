// Owns what computes: the GPU or the CPU, as asked or as found, and a line that says why.

import { present } from '../assert.ts'
import { LatticeError } from '../errors.ts'
import type { DeviceReport, GpuReport } from '../backends/cuda/describe.ts'

export type DeviceOption = 'auto' | 'cpu' | 'cuda'

export interface DeviceChoice {
  device: 'cpu' | 'cuda'
  /** Such as "cuda, as asked" or "cpu, since …". */
  reason: string
  /** Which GPU, if it is one. */
  gpu?: DeviceReport
}

/**
 * `auto` takes a GPU that can be used, and says what it took; `cuda` never falls back.
 * @param describe what there is; loads the driver, so it is only called when it matters
 * @throws LatticeError `backend_unavailable` if `cuda` was asked for and something is missing
 */
export async function chooseDevice(
  option: DeviceOption,
  describe: () => Promise<GpuReport> = describeGpu,
): Promise<DeviceChoice> {
  if (option === 'cpu') return { device: 'cpu', reason: 'cpu, as asked' }
  const report = await describe()
  const problem = problemOf(report)
  const gpu = report.devices.find((device) => device.problem === undefined)
  if (option === 'cuda') {
    if (problem) throw problem
    return { device: 'cuda', reason: 'cuda, as asked', gpu: present(gpu, 'a usable GPU') }
  }
  if (!problem && gpu) return { device: 'cuda', reason: `cuda, since ${gpu.name} can be used`, gpu }
  return { device: 'cpu', reason: `cpu, since ${whyNot(report)}` }
}

async function describeGpu(): Promise<GpuReport> {
  return (await import('../backends/cuda/describe.ts')).describeGpu()
}

/** The first thing that is in the way of computing on a GPU. */
function problemOf({ usable, parts, devices }: GpuReport): LatticeError | undefined {
  if (usable) return undefined
  const part = parts.find(({ found }) => !found)
  const device = devices[0]
  const what =
    part?.problem ??
    (device?.problem === undefined
      ? 'The driver shows no GPU.'
      : `${device.name} cannot be used: ${device.problem}.`)
  const todo = part?.todo ?? '`lattice inspect gpu` shows what was found; or use --device cpu.'
  return new LatticeError('backend_unavailable', what, { todo })
}

/** One clause of a sentence: "auto" has nobody to bother with folders. */
function whyNot({ parts, devices }: GpuReport): string {
  const missing = parts.filter(({ found }) => !found)
  if (missing.some(({ part }) => part === 'driver')) return 'there is no usable GPU driver'
  const [device] = devices
  if (device === undefined) return 'the driver shows no GPU'
  if (device.problem !== undefined) return `${device.name} is not supported: ${device.problem}`
  return `${device.name} is there, but ${missing.map(({ title }) => title).join(' and ')} is not`
}
