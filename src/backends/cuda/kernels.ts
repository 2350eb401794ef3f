// Owns the loaded kernels of one GPU: a function by file, name and definitions, compiled or taken
// from the cache when it is first asked for.

import { FUNCTION } from '../../ffi/cuda.ts'
import type { CudaDevice } from './device.ts'
import type { ModuleCache } from './module-cache.ts'

/** A function of a file of kernels/, specialised by definitions. */
export type KernelFinder = (
  file: string,
  kernel: string,
  defines?: Readonly<Record<string, number>>,
) => number

export class Kernels {
  private readonly device: CudaDevice
  private readonly cache: ModuleCache
  private readonly modules = new Map<string, number>()

  constructor(device: CudaDevice, cache: ModuleCache) {
    this.device = device
    this.cache = cache
  }

  /** @throws LatticeError `backend_unavailable`, `kernel_compile_failed`, `gpu_call_failed` */
  readonly find: KernelFinder = (file, kernel, defines = {}) => {
    const { driver, architecture } = this.device
    const key = `${file} ${JSON.stringify(defines)}`
    let module = this.modules.get(key)
    if (module === undefined) {
      const { image } = this.cache.get({ file, defines }, architecture)
      module = driver.loadModule(image)
      this.modules.set(key, module)
    }
    const found = driver.functionOf(module, kernel)
    // One division of L1 for all: a multiprocessor changes it only when it is empty, which would
    // keep a kernel from starting while the one before it ends.
    driver.setFunctionAttribute(found, FUNCTION.sharedCarveoutPercent, 100)
    return found
  }

  close(): void {
    for (const module of this.modules.values()) this.device.driver.unloadModule(module)
  }
}
