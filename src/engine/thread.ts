// Owns the engine thread: it takes messages between steps, runs steps while there is work, gives
// idle memory back, and sleeps otherwise. Entry point of a worker.

import { parentPort, receiveMessageOnPort, workerData } from 'node:worker_threads'
import { present } from '../assert.ts'
import type { Backend } from '../backends/backend.ts'
import type { CpuOffload } from '../backends/cpu/backend.ts'
import { toLatticeError } from '../errors.ts'
import type { TokenLogprobs } from './api.ts'
import type { PagerStart } from '../tier/pager.ts'
import type { TierFacts } from '../tier/tier.ts'
import { memoryPressure } from '../os/pressure.ts'
import { EngineCore } from './core.ts'
import type { GoneClients } from './gone.ts'
import { DirectPrompts } from './handover.ts'
import type {
  EngineThreadOptions,
  FinishMessage,
  FromEngine,
  HostTierFacts,
  OffloadPlace,
  ToEngine,
} from './messages.ts'

const port = present(parentPort, 'the parent thread')
const options = workerData as EngineThreadOptions
const signal = new Int32Array(options.signal)

let tokens: number[] = []
let logprobs: Map<number, TokenLogprobs> | undefined
let finished: FinishMessage[] = []
/** Prompts that come past the main thread. */
let direct: DirectPrompts | undefined

function say(message: FromEngine): void {
  port.postMessage(message)
}

function flush(): void {
  if (tokens.length === 0 && finished.length === 0) return
  say({ kind: 'tokens', tokens: Int32Array.from(tokens), logprobs, finished })
  tokens = []
  logprobs = undefined
  finished = []
}

interface Opened {
  backend: Backend
  variant: string
  repackedBytes: Record<string, number>
  tier?: TierFacts | undefined
  hostTier?: HostTierFacts | undefined
  /** What the start took. */
  started?: string
  /** Closes the backend and what it computes on. */
  close?(): void
}

/** Undefined unless the kernel says which clients have gone. */
async function openGone(): Promise<GoneClients | undefined> {
  if (!options.disconnects) return undefined
  const [{ BpfRing }, { GoneClients: Gone }] = await Promise.all([
    import('../ffi/bpf-ring.ts'),
    import('./gone.ts'),
  ])
  const ring = new BpfRing(options.disconnects.fd, options.disconnects.bytes)
  return new Gone((take) => ring.drain(take))
}

/** Only the chosen backend's code is loaded. */
async function openBackend(): Promise<Opened> {
  const choice = options.backend
  if (choice.kind === 'null') {
    const { NullBackend } = await import('../backends/null/backend.ts')
    const backend = new NullBackend({ ...options, ...choice })
    return { backend, variant: 'null', repackedBytes: {} }
  }
  const { openModel } = await import('../model/load.ts')
  if (choice.kind === 'cuda') {
    const { openCuda } = await import('../backends/cuda/open.ts')
    const { kvOffload } = options
    const offload = kvOffload && { ...kvOffload, signal: options.signal, startPager }
    const onStarting = (what: string) => say({ kind: 'starting', what })
    const gpu = openCuda(
      openModel(choice.modelPath),
      { ...options, ...choice, offload },
      onStarting,
    )
    return { ...gpu, variant: gpu.device.architecture, repackedBytes: {} }
  }
  const { CpuBackend } = await import('../backends/cpu/backend.ts')
  const backend = new CpuBackend(openModel(choice.modelPath), {
    ...options,
    cpus: choice.cpus,
    ...(options.kvOffload && { offload: await offloadTo(options.kvOffload) }),
  })
  const repackedBytes = Object.fromEntries(backend.weights.repackedBytes)
  return { backend, variant: backend.variant, repackedBytes, tier: backend.kv.tier?.facts }
}

function startPager(start: PagerStart): void {
  say({ kind: 'pager', start })
}

async function offloadTo({ store, ...place }: OffloadPlace): Promise<CpuOffload> {
  const offload = { ...place, signal: options.signal, startPager }
  if (!store) return offload
  const { readSecret } = await import('../tier/store/secret.ts')
  return { ...offload, store: { directory: store.directory, secret: readSecret(store.key) } }
}

function makeCore(backend: Backend, kvPages: number, gone: GoneClients | undefined): EngineCore {
  const { pageBytes } = backend.kv.layout.shape
  const prefixPages = Math.floor((options.prefixCacheBytes ?? 0) / pageBytes)
  return new EngineCore(
    backend,
    {
      maxSequences: options.maxSequences,
      kvPages,
      prefixPages,
      prefixEviction: options.prefixEviction,
      prefixOutput: options.prefixCacheOutput,
      watermarks: options.kvWatermarks,
    },
    {
      onStart(id, cachedTokens) {
        say({ kind: 'started', id, cachedTokens })
      },
      onToken(id, token, chosen) {
        if (chosen) (logprobs ??= new Map()).set(tokens.length / 2, chosen)
        tokens.push(id, token)
      },
      onFinish(id, reason, outputTokens, error, score) {
        gone?.finished(id)
        direct?.finished(id)
        finished.push({ id, reason, outputTokens, error: error?.toJSON(), score })
      },
    },
    () => performance.now(),
  )
}

/** How old the client's last snapshot may be when a step begins. */
const SNAPSHOT_AGE_MS = 500

/** What goes to a disk gives memory back; a GPU's KV lies in its own. */
const relieves = options.kvOffload !== undefined && options.backend.kind !== 'cuda'

/** How often the kernel is asked whether the machine has too little memory, if that helps. */
const PRESSURE_CHECK_MS = 1000

/** Percent of the time that some task waits for memory, from which on cached prefixes go. */
const PRESSURE_MAX = 10

/** At the end: a disk that takes longer gets no more of it. */
const FLUSH_MS_MAX = 5_000

function flushStore(core: EngineCore): void {
  const end = performance.now() + FLUSH_MS_MAX
  for (;;) {
    const seen = Atomics.load(signal, 0)
    if (!core.flush() || performance.now() > end) return
    Atomics.wait(signal, 0, seen, 10)
  }
}

let publishedMs = -Infinity
let pressureMs = -Infinity

function takeDirect(core: EngineCore): void {
  direct?.take((id, request) => core.submit(id, request))
}

/** Takes in what the main thread said; returns false if the engine is to close. */
function hear(core: EngineCore, gone: GoneClients | undefined): boolean {
  for (let item = receiveMessageOnPort(port); item; item = receiveMessageOnPort(port)) {
    // What was written before this was said comes before it.
    takeDirect(core)
    const message = item.message as ToEngine
    if (message.kind === 'submit') {
      gone?.submitted(message.ids, message.request.connection)
      core.submitChoices(message.ids, message.request, message.samplings)
    } else if (message.kind === 'fork') {
      gone?.forked(message.parent, message.id)
      core.fork(message.parent, message.id, message.sampling)
    } else if (message.kind === 'abort') core.abort(message.id)
    else if (message.kind === 'direct') {
      for (const id of [...(direct?.live ?? [])]) core.abort(id)
      direct = message.place && new DirectPrompts(message.place)
    } else if (message.kind === 'close') return false
    else if (message.kind === 'ask') {
      const answer = core.answer(message.question)
      say({ kind: 'answer', ticket: message.ticket, answer })
    } else say({ kind: 'snapshot', ticket: message.ticket, snapshot: core.snapshot() })
  }
  return true
}

/** What is done between two steps but rarely. */
function lookAround(core: EngineCore): void {
  if (!core.idle && performance.now() - publishedMs > SNAPSHOT_AGE_MS) {
    say({ kind: 'snapshot', ticket: 0, snapshot: core.snapshot() })
    publishedMs = performance.now()
  }
  if (relieves && performance.now() - pressureMs > PRESSURE_CHECK_MS) {
    if ((memoryPressure() ?? 0) > PRESSURE_MAX) core.relieve()
    pressureMs = performance.now()
  }
}

/** Returns when the engine is closed. Loops within this one would be compiled again and again. */
function run(core: EngineCore, gone: GoneClients | undefined): void {
  for (;;) {
    const seen = Atomics.load(signal, 0)
    if (!hear(core, gone)) return flushStore(core)
    takeDirect(core)
    lookAround(core)
    gone?.look((id) => core.abort(id))
    const worked = core.step()
    flush()
    if (worked) continue
    const idleMs = relieves ? PRESSURE_CHECK_MS : Infinity
    Atomics.wait(signal, 0, seen, Math.min(idleMs, core.settle() ?? Infinity))
  }
}

let opened: Opened | undefined
try {
  opened = await openBackend()
  const { backend, variant, repackedBytes, tier, hostTier, started } = opened
  const { layout } = backend.kv
  const kvPages = Math.floor(options.kvBytes / layout.shape.pageBytes)
  const gone = await openGone()
  const core = makeCore(backend, kvPages, gone)
  say({
    kind: 'ready',
    facts: {
      ...{ variant, repackedBytes, layout, kvPages, started },
      ...(tier && { tier }),
      ...(hostTier && { hostTier }),
    },
  })
  run(core, gone)
} catch (thrown) {
  flush()
  say({ kind: 'failed', error: toLatticeError(thrown).toJSON() })
}
if (opened?.close) opened.close()
else opened?.backend.close()
port.close()
