// Owns a model on a GPU, ready to serve: the device, KV memory with its pager, and the backend.

import { present } from '../../assert.ts'
import type { HostTierFacts } from '../../engine/messages.ts'
import { LatticeError } from '../../errors.ts'
import type { KvLayout } from '../../kv/layout.ts'
import { regionsFor } from '../../kv/regions.ts'
import type { KvTier } from '../../kv/tier.ts'
import type { Model } from '../../model/model.ts'
import { DiskTier, type OffloadOptions, type TierFacts } from '../../tier/tier.ts'
import { CudaBackend } from './backend.ts'
import { compileAhead } from './compile-ahead.ts'
import { CudaDevice } from './device.ts'
import type { Quantization } from './quantization.ts'
import { RELEASE_ROUNDS } from './forward.ts'
import { kernelsOf } from './kernel-list.ts'
import { gpuKvLayout } from './kv-layout.ts'
import { CudaKvMemory } from './kv-memory.ts'
import { HostTier } from './host-tier.ts'
import type { HostPages } from './host-pages.ts'
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
  /** What matrices become, where their shapes allow it; bfloat16 unless given. */
  quantization?: Quantization
  /** When idle KV memory goes back to the driver; half a second unless given. */
  kvIdleReleaseMs?: number
  /** Pinned memory of the host for KV; none unless given, or what leads to a disk. */
  kvHostBytes?: number
  /** A disk beneath. */
  offload?: DiskOptions | undefined
}

export type DiskOptions = Omit<OffloadOptions, 'faults' | 'store'>

export interface OpenedCuda {
  backend: CudaBackend
  device: CudaDevice
  layout: KvLayout
  hostTier?: HostTierFacts
  /** The disk beneath. */
  tier?: TierFacts
  /** What the start took, part by part. */
  started: string
  close(): void
}

const IDLE_RELEASE_MS = 500

/** What KV passes through on its way to a disk, unless more is given. */
const STAGING_BYTES = 256 << 20

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
  compileFor(model, start, device, modules, times, say)
  const layout = gpuKvLayout(model.config, start.contextLength)
  const kv = new CudaKvMemory(device, layout, new ThreadPager(device), {
    slots: maxSequences,
    regions: regionsFor(maxSequences),
    limitPages: Math.floor(start.kvBytes / layout.shape.pageBytes),
    idleReleaseMs: start.kvIdleReleaseMs ?? IDLE_RELEASE_MS,
  })
  const facts = openTier(device, kv, start)
  if (facts.hostTier) times.done('pinned memory')
  const sizes = { maxSequences, stepTokens, quantization: start.quantization }
  const backend = new CudaBackend(model, { device, modules, kv, ...sizes, times, say })
  warmUp(backend)
  times.done('first steps')
  const close = (): void => {
    backend.close()
    device.close()
  }
  return { backend, device, layout, started: String(times), close, ...facts }
}

function openTier(
  device: CudaDevice,
  kv: CudaKvMemory,
  { kvHostBytes, offload }: CudaStart,
): { hostTier?: HostTierFacts; tier?: TierFacts } {
  if (kvHostBytes === undefined && !offload) return {}
  const { layout } = kv
  const { pageBytes } = layout.shape
  const frames = Math.floor((kvHostBytes ?? STAGING_BYTES) / pageBytes)
  const least = offload ? 2 : 1
  if (frames < least) {
    throw new LatticeError(
      'usage',
      `${kvHostBytes} bytes of the host's memory hold ${frames} pages of ${pageBytes} bytes.`,
      { todo: `Give --kv-host ${least * pageBytes} or more.` },
    )
  }
  let disk: DiskTier | undefined
  const below = (pages: HostPages): KvTier => {
    return (disk = diskBelow(pages, layout, present(offload, 'a disk')))
  }
  const start = performance.now()
  kv.tier = new HostTier(device, kv, { frames, ...(offload && { below }) })
  const hostTier = { bytes: frames * pageBytes, pinnedMs: performance.now() - start }
  return { hostTier, ...(disk && { tier: disk.facts }) }
}

/** A disk tier over memory of the host whose pages are the columns of its only region. */
export function diskBelow(pages: HostPages, layout: KvLayout, offload: DiskOptions): DiskTier {
  const region = { ...layout, rangeBytes: pages.bytes, slotBytes: pages.bytes }
  const memory = { layout: region, slots: 0, regions: 1, address: pages.address, fd: pages.fd }
  // Nobody touches a page before what it shall hold has come: nothing is to be answered.
  return new DiskTier(memory, { ...offload, faults: false })
}

function compileFor(
  model: Model,
  { maxSequences, quantization }: CudaStart,
  device: CudaDevice,
  modules: ModuleCache,
  times: StartTimes,
  say: (what: string) => void,
): void {
  const kernels = kernelsOf(model, device.info, RELEASE_ROUNDS, maxSequences, quantization)
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
