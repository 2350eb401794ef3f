// Owns what this machine has for computing on a GPU: driver, devices, compiler and matrix library,
// each with where it was found, or what is missing and how to get it.

import { toLatticeError } from '../../errors.ts'
import type { GpuDevice } from '../../ffi/cuda.ts'
import { cudaIncludeFolders, type CudaLibrary, findCudaLibrary } from '../../ffi/cuda-libraries.ts'
import { loadCublasLt } from '../../ffi/cublaslt.ts'
import { NativeCuda } from '../../ffi/cuda-native.ts'
import { loadNvrtc } from '../../ffi/nvrtc.ts'
import { architectureOf, unsupported } from './device.ts'
import { keptKernels } from './module-cache.ts'

export interface PartReport {
  part: CudaLibrary
  title: string
  found: boolean
  path?: string
  /** As its maker writes it: 13.0. */
  version?: string
  /** What is wrong, and what to do about it. */
  problem?: string
  todo?: string
  /** Folders looked in, if it was not found. */
  looked?: string[]
}

export interface DeviceReport extends GpuDevice {
  architecture: string
  freeBytes: number
  /** Why Lattice cannot use it; undefined if it can. */
  problem?: string
}

export interface GpuReport {
  /** A supported GPU, and all that computing on it needs. */
  usable: boolean
  parts: PartReport[]
  devices: DeviceReport[]
  /** Folders with CUDA's headers; kernels do without. */
  includeFolders: string[]
  /** Compiled before: a start with a model that needs no others takes seconds less. */
  kernels: { folder: string; count: number; bytes: number }
}

export function describeGpu(): GpuReport {
  let devices: DeviceReport[] = []
  const parts = [
    part('driver', () => {
      const driver = new NativeCuda()
      devices = driver.devices().map((device) => describe(driver, device))
      return { path: driver.path, version: dotted(driver.version) }
    }),
    part('nvrtc', loadNvrtc),
    part('cublaslt', () => {
      const { path, version } = loadCublasLt()
      // 130100 is 13.1: its own scheme, with two more digits.
      return { path, version: `${Math.floor(version / 10_000)}.${Math.floor(version / 100) % 100}` }
    }),
  ]
  const usable =
    parts.every(({ found }) => found) && devices.some(({ problem }) => problem === undefined)
  const kernels = keptKernels()
  return { usable, parts, devices, includeFolders: cudaIncludeFolders(), kernels }
}

function part(library: CudaLibrary, load: () => { path: string; version: string }): PartReport {
  const { title, folders } = findCudaLibrary(library)
  try {
    const { path, version } = load()
    return { part: library, title, found: true, path, version }
  } catch (thrown) {
    const { message, todo } = toLatticeError(thrown)
    const missing = { part: library, title, found: false, problem: message, looked: folders }
    return todo === undefined ? missing : { ...missing, todo }
  }
}

function describe(driver: NativeCuda, device: GpuDevice): DeviceReport {
  const problem = unsupported(device)
  const architecture = architectureOf(device.capability)
  const freeBytes = freeOn(driver, device.index)
  return { ...device, architecture, freeBytes, ...(problem === undefined ? {} : { problem }) }
}

function freeOn(driver: NativeCuda, index: number): number {
  driver.setContext(driver.retainContext(index))
  try {
    return driver.memoryInfo().freeBytes
  } finally {
    driver.releaseContext(index)
  }
}

/** 13010 → 13.1 */
function dotted(version: number): string {
  return `${Math.floor(version / 1000)}.${Math.floor((version % 1000) / 10)}`
}
