// Owns a model on a GPU, ready to serve: the device, KV memory with its pager, and the backend.

import type { KvLayout } from '../../kv/layout.ts'
import { regionsFor } from '../../kv/regions.ts'
import type { Model } from '../../model/model.ts'
import { CudaBackend } from './backend.ts'
import { compileAhead } from './compile-ahead.ts'
import { CudaDevice } from './device.ts'
import { RELEASE_ROUNDS } from './forward.ts'
import { kernelsOf } from './kernel-list.ts'
import { CudaKvMemory, gpuKvLayout } from './kv-memory.ts'
import { ModuleCache } from './module-cache.ts'
import { ThreadPager } from './pager.ts'
import { StartTimes } from './start-times.ts'
import { warmUp } from './warm-up.ts'

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
  /** What the start took, part by part. */
  started: string
  close(): void
}

const IDLE_RELEASE_MS = 500

/**
 * @param say is told of what takes long, before it begins
 * @throws LatticeError `backend_unavailable`, `kernel_compile_failed`, `gpu_call_failed`,
 *   `model_unsupported`
 */
export function openCuda(
  model: Model,
  start: CudaStart,
  say: (what: string) => void = () => {},
): OpenedCuda {
  const { maxSequences, stepTokens } = start
  const times = new StartTimes()
  const device = CudaDevice.open(start.device)
  times.done('driver')
  const modules = new ModuleCache()
  compileFor(model, device, modules, times, say)
  const layout = gpuKvLayout(model.config, start.contextLength)
  const kv = new CudaKvMemory(device, layout, new ThreadPager(device), {
    slots: maxSequences,
    regions: regionsFor(maxSequences),
    limitPages: Math.floor(start.kvBytes / layout.shape.pageBytes),
    idleReleaseMs: start.kvIdleReleaseMs ?? IDLE_RELEASE_MS,
  })
  const sizes = { maxSequences, stepTokens }
  const backend = new CudaBackend(model, { device, modules, kv, ...sizes, times, say })
  warmUp(backend)
  times.done('first steps')
  const close = (): void => {
    backend.close()
    device.close()
  }
  return { backend, device, layout, started: String(times), close }
}

function compileFor(
  model: Model,
  device: CudaDevice,
  modules: ModuleCache,
  times: StartTimes,
  say: (what: string) => void,
): void {
  const kernels = kernelsOf(model, device.info, RELEASE_ROUNDS)
  const { architecture } = device
  const compiled = compileAhead(modules, kernels, architecture, (count, threads) => {
    const who = threads > 1 ? `${threads} threads` : 'a thread'
    say(`compiling ${count} kernels for ${architecture} on ${who}; kept in ${modules.folder}`)
  })
  times.done('kernels', compiled > 0 ? `${compiled} compiled` : undefined)
  if (modules.unkept !== undefined) {
    say(`compiled kernels cannot be kept, so each start takes as long: ${modules.unkept}`)
  }
}
