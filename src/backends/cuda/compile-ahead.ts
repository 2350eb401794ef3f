// Owns compiling many kernels at once, on threads: one takes 0.1 to 2 seconds, and the compiler
// runs as many side by side as there are cores.

import { availableParallelism } from 'node:os'
import { Worker } from 'node:worker_threads'
import type { KernelSource, ModuleCache } from './module-cache.ts'

/** What the threads share. */
export interface CompileRun {
  folder: string
  sources: string
  architecture: string
  kernels: readonly KernelSource[]
  /** See `COUNT`. */
  counts: Int32Array<SharedArrayBuffer>
}

/** How many of the kernels somebody has begun, and how many are done. */
export const COUNT = { begun: 0, done: 1 } as const

/** A thread is not worth its start for less. */
const KERNELS_A_THREAD = 2

/** No kernel takes that long; whoever hangs is not waited for. */
const STUCK_MS = 60_000

/**
 * Compiles what the cache lacks, and returns when it is there. What does not compile is left to
 * whoever asks for it, and gets the error.
 * @param say is told before it begins, if there is anything to compile
 * @returns how many were missing
 */
export function compileAhead(
  modules: ModuleCache,
  kernels: readonly KernelSource[],
  architecture: string,
  say: (kernels: number, threads: number) => void = () => {},
): number {
  const missing = kernels.filter((kernel) => !modules.has(kernel, architecture))
  if (missing.length === 0) return 0
  const threads = Math.min(availableParallelism(), Math.ceil(missing.length / KERNELS_A_THREAD))
  say(missing.length, threads)
  const { folder, sources } = modules
  const counts = new Int32Array(new SharedArrayBuffer(8))
  const run: CompileRun = { folder, sources, architecture, kernels: missing, counts }
  // This thread is one of them: all gets done even if no other starts.
  for (let i = 1; i < threads; i++) {
    const worker = new Worker(new URL('compile-thread.ts', import.meta.url), { workerData: run })
    worker.unref()
    worker.on('error', () => {})
  }
  compileShare(run, modules)
  for (;;) {
    const done = Atomics.load(counts, COUNT.done)
    if (done === missing.length) break
    if (Atomics.wait(counts, COUNT.done, done, STUCK_MS) === 'timed-out') break
  }
  return missing.length
}

/** Compiles one kernel after the other that nobody else has begun. */
export function compileShare({ architecture, kernels, counts }: CompileRun, modules: ModuleCache) {
  for (;;) {
    const kernel = kernels[Atomics.add(counts, COUNT.begun, 1)]
    if (!kernel) return
    try {
      modules.get(kernel, architecture)
    } catch {
      // Whoever needs it meets the same error, where it can be told.
    }
    Atomics.add(counts, COUNT.done, 1)
    Atomics.notify(counts, COUNT.done)
  }
}
