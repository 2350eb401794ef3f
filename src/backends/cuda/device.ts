// Owns an opened GPU: its facts, and the context in which everything on it happens.

import { LatticeError } from '../../errors.ts'
import type { CudaDriver, GpuDevice } from '../../ffi/cuda.ts'
import { NativeCuda } from '../../ffi/cuda-native.ts'

export class CudaDevice {
  readonly driver: CudaDriver
  readonly info: GpuDevice
  readonly context: number

  /**
   * Opens a GPU and makes its context that of this thread.
   * @throws LatticeError `backend_unavailable` if there is no driver, no such GPU, or one without
   *   virtual memory; `gpu_call_failed`
   */
  static open(index = 0, driver: CudaDriver = new NativeCuda()): CudaDevice {
    const devices = driver.devices()
    const info = devices[index]
    if (info === undefined) {
      throw new LatticeError(
        'backend_unavailable',
        `GPU ${index} is not there: the driver shows ${devices.length}.`,
        { todo: 'Check `nvidia-smi` and CUDA_VISIBLE_DEVICES, or use --device cpu.' },
      )
    }
    const problem = unsupported(info)
    if (problem !== undefined) {
      throw new LatticeError('backend_unavailable', `${info.name} cannot be used: ${problem}.`, {
        todo: 'Lattice runs on an A100, L4, RTX 3090 or anything later; or use --device cpu.',
      })
    }
    const context = driver.retainContext(index)
    driver.setContext(context)
    return new CudaDevice(driver, info, context)
  }

  private constructor(driver: CudaDriver, info: GpuDevice, context: number) {
    this.driver = driver
    this.info = info
    this.context = context
  }

  /** What kernels are compiled for: Hopper's own instructions need the `a`. */
  get architecture(): string {
    return architectureOf(this.info.capability)
  }

  close(): void {
    this.driver.releaseContext(this.info.index)
  }
}

/** Why Lattice cannot compute on a GPU; undefined if it can. */
export function unsupported({ capability, virtualMemory }: GpuDevice): string | undefined {
  if (capability < 80) {
    return `its compute capability is ${(capability / 10).toFixed(1)}, 8.0 is needed`
  }
  return virtualMemory ? undefined : 'it has no virtual memory management'
}

export function architectureOf(capability: number): string {
  return capability === 90 ? 'sm_90a' : `sm_${capability}`
}
