// Owns the pool of compute threads: made once, each thread on a core of its own, waiting awake for
// a moment between steps so that the next one starts at once.

import type { GgmlCpu } from '../../ffi/ggml.ts'
import { loadBase } from '../../ffi/ggml.ts'
import { mapAnonymous, unmap, viewMemory } from '../../ffi/libc.ts'

/** `struct ggml_threadpool_params` in ggml.h. */
export const PARAMS = {
  bytes: 528,
  cpumask: 0,
  threads: 512,
  priority: 516,
  poll: 520,
  strict: 524,
}

/**
 * How long an idle thread spins before it sleeps, in ggml's units of 131,072 pauses (about 5 ms).
 * Long enough for sampling between two steps, short enough to leave an idle machine idle.
 */
const POLL = 2

export interface ThreadPool {
  readonly threads: number
  readonly handle: number
  free(): void
}

/**
 * @param cpus the cores to use, one thread each; the calling thread becomes the last of them.
 * @param pin binds each thread to its core.
 */
export function createThreadPool(cpu: GgmlCpu, cpus: readonly number[], pin: boolean): ThreadPool {
  const params = mapAnonymous(PARAMS.bytes)
  loadBase().ggml_threadpool_params_init(params, cpus.length)
  const view = new DataView(viewMemory(params, PARAMS.bytes))
  if (pin) for (const core of cpus) view.setUint8(PARAMS.cpumask + core, 1)
  view.setUint32(PARAMS.poll, POLL, true)
  view.setUint8(PARAMS.strict, pin ? 1 : 0)
  const handle = cpu.ggml_threadpool_new(params)
  unmap(params, PARAMS.bytes)
  return {
    threads: cpus.length,
    handle,
    free: () => cpu.ggml_threadpool_free(handle),
  }
}
