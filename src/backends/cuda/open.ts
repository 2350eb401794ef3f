// Owns a model on a GPU, ready to serve: the device, KV memory with its pager, and the backend.

import type { KvLayout } from '../../kv/layout.ts'
import { regionsFor } from '../../kv/regions.ts'
import type { Model } from '../../model/model.ts'
import { CudaBackend } from './backend.ts'
import { CudaDevice } from './device.ts'
import { CudaKvMemory, gpuKvLayout } from './kv-memory.ts'
import { ModuleCache } from './module-cache.ts'
import { ThreadPager } from './pager.ts'

export interface CudaStart {
  /** Which GPU. */
  device: number
  contextLength: number
  maxSequences: number
  stepTokens: number
  kvBytes: number
  /** When idle KV memory goes back to the driver; half a second unless given. */
  kvIdleReleaseMs?: number
}

export interface OpenedCuda {
  backend: CudaBackend
  device: CudaDevice
  layout: KvLayout
  close(): void
}

const IDLE_RELEASE_MS = 500

/** @throws LatticeError `backend_unavailable`, `kernel_compile_failed`, `gpu_call_failed` */
export function openCuda(model: Model, start: CudaStart): OpenedCuda {
  const { maxSequences, stepTokens } = start
  const device = CudaDevice.open(start.device)
  const layout = gpuKvLayout(model.config, start.contextLength)
  const kv = new CudaKvMemory(device, layout, new ThreadPager(device), {
    slots: maxSequences,
    regions: regionsFor(maxSequences),
    limitPages: Math.floor(start.kvBytes / layout.shape.pageBytes),
    idleReleaseMs: start.kvIdleReleaseMs ?? IDLE_RELEASE_MS,
  })
  const modules = new ModuleCache()
  const backend = new CudaBackend(model, { device, modules, kv, maxSequences, stepTokens })
  const close = (): void => {
    backend.close()
    device.close()
  }
  return { backend, device, layout, close }
}
