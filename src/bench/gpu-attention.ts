// Owns the measurement of attention on a GPU: decode against the bandwidth of memory, prefill in
// operations a second, both against PyTorch's SDPA where Python has torch.

import { spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { present } from '../assert.ts'
import { type AttentionShape, CudaAttention } from '../backends/cuda/attention.ts'
import type { CudaDevice } from '../backends/cuda/device.ts'
import { Kernels } from '../backends/cuda/kernels.ts'
import type { ModuleCache } from '../backends/cuda/module-cache.ts'
import { addressOf } from '../ffi/block.ts'
import { KernelLaunch } from '../ffi/kernel-launch.ts'

/** Llama 3.1 8B's: 4 KiB a token and layer, 128 KiB from a token to the next. */
const SHAPE: AttentionShape = { heads: 32, kvHeads: 8, headDim: 128, scale: 128 ** -0.5 }
const LAYERS = 32
const TOKEN_BYTES = 2 * SHAPE.kvHeads * SHAPE.headDim * 2
const TOKEN_STRIDE = LAYERS * TOKEN_BYTES
const RUNS = 20
const PEER = fileURLToPath(new URL('../../bench/attention-sdpa.py', import.meta.url))

interface DecodeCase {
  batch: number
  context: number
}

interface PrefillCase {
  batch: number
  tokens: number
  /** Tokens of each sequence that are there already. */
  history: number
}

const DECODE: readonly DecodeCase[] = [
  { batch: 1, context: 1024 },
  { batch: 8, context: 1024 },
  { batch: 64, context: 640 },
  { batch: 64, context: 4096 },
  { batch: 256, context: 2048 },
]
const PREFILL: readonly PrefillCase[] = [
  { batch: 1, tokens: 2048, history: 0 },
  { batch: 4, tokens: 2048, history: 0 },
  { batch: 1, tokens: 8192, history: 0 },
  { batch: 1, tokens: 512, history: 7680 },
]

/** Microseconds by SDPA's backend; null where it refused. */
export interface PeerTimes {
  cudnn: number | null
  flash: number | null
}

export interface DecodeTiming extends DecodeCase {
  /** Undefined if the KV does not fit in the GPU's free memory. */
  us: number | undefined
  /** Of the bandwidth that a plain read has. */
  ofReading: number | undefined
  peer: PeerTimes | undefined
}

export interface PrefillTiming extends PrefillCase {
  us: number
  teraflops: number
  peer: PeerTimes | undefined
}

export interface AttentionReport {
  /** Torch's version, or why there is none to compare with. */
  peer: string
  decode: DecodeTiming[]
  prefill: PrefillTiming[]
}

/**
 * @param readGBs bandwidth of a plain read on this device, measured in the same run
 * @param python the interpreter that may have torch
 */
export function benchAttention(
  device: CudaDevice,
  modules: ModuleCache,
  readGBs: number,
  python = 'python3',
): AttentionReport {
  const bench = new AttentionBench(device, modules)
  const decode = DECODE.map((of) => ({ of, us: bench.decode(of) }))
  const prefill = PREFILL.map((of) => ({ of, us: bench.prefill(of) }))
  bench.close()
  const peer = askPeer(python)
  return {
    peer: peer.version,
    decode: decode.map(({ of, us }) => ({
      ...of,
      us,
      ofReading: us && (of.batch * of.context * TOKEN_BYTES) / us / 1e3 / readGBs,
      peer: peer.decode.find((p) => p.batch === of.batch && p.context === of.context),
    })),
    prefill: prefill.map(({ of, us }) => ({
      ...of,
      us,
      teraflops: operations(of) / us / 1e6,
      peer: of.history
        ? undefined
        : peer.prefill.find((p) => p.batch === of.batch && p.tokens === of.tokens),
    })),
  }
}

/** Multiplications and additions of both products, without what the causal mask hides. */
function operations({ batch, tokens, history }: PrefillCase): number {
  const seen = tokens * history + (tokens * tokens) / 2
  return 4 * batch * SHAPE.heads * SHAPE.headDim * seen
}

class AttentionBench {
  private readonly device: CudaDevice
  private readonly modules: ModuleCache
  private readonly kernels: Kernels
  private readonly stream: number
  private readonly fill: KernelLaunch

  constructor(device: CudaDevice, modules: ModuleCache) {
    this.device = device
    this.modules = modules
    this.kernels = new Kernels(device, modules)
    this.stream = device.driver.createStream()
    const fill = this.kernels.find('step.cu', 'fillRandom')
    this.fill = new KernelLaunch(fill, ['u64', 'u64', 'u32', 'f32'])
  }

  /** @returns undefined if there is no room */
  decode({ batch, context }: DecodeCase): number | undefined {
    const { freeBytes } = this.device.driver.memoryInfo()
    if (batch * context * TOKEN_STRIDE > freeBytes - 2 ** 30) return undefined
    return this.measure(batch, context, batch, (attention, q, out, put) => {
      const slots = put(Int32Array.from({ length: batch }, (_, i) => (i * 37) % batch))
      const lengths = put(new Int32Array(batch).fill(context))
      return (layer) =>
        attention.decode(this.stream, { q, out, slots, lengths, rows: batch }, layer)
    })
  }

  prefill({ batch, tokens, history }: PrefillCase): number {
    const us = this.measure(batch, history + tokens, batch * tokens, (attention, q, out, put) => {
      const each = (value: (i: number) => number): number =>
        put(Int32Array.from({ length: batch }, (_, i) => value(i)))
      const segments = {
        ...{ q, out, firstRows: each((i) => i * tokens), starts: each(() => history) },
        ...{ counts: each(() => tokens), slots: each((i) => i), segments: batch },
      }
      return (layer) => attention.prefill(this.stream, segments, layer)
    })
    return us
  }

  close(): void {
    this.kernels.close()
    this.device.driver.destroyStream(this.stream)
  }

  /** The median time of a launch, of a graph that goes through layers so that no cache helps. */
  private measure(
    slots: number,
    slotTokens: number,
    rows: number,
    prepare: (
      attention: CudaAttention,
      q: number,
      out: number,
      put: (values: Int32Array) => number,
    ) => (layer: number) => void,
  ): number {
    const { device, modules, stream } = this
    const { driver } = device
    const owned: number[] = []
    const allocate = (bytes: number): number =>
      present(owned[owned.push(driver.allocate(bytes)) - 1], 'memory')
    const put = (values: Int32Array): number => {
      const address = allocate(values.byteLength)
      driver.copyToDevice(address, addressOf(values), values.byteLength, stream)
      driver.synchronizeStream(stream)
      return address
    }
    const slotStride = slotTokens * TOKEN_STRIDE
    const base = this.random(allocate(slots * slotStride), slots * slotStride)
    const rowBytes = SHAPE.heads * SHAPE.headDim * 2
    const q = this.random(allocate(rows * rowBytes), rows * rowBytes)
    const kv = { base, slotStride, tokenStride: TOKEN_STRIDE, slots, slotTokens }
    const attention = new CudaAttention({ device, modules, shape: SHAPE, kv, rowsMax: slots })
    const queue = prepare(attention, q, allocate(rows * rowBytes), put)
    const us = medianUs(device, stream, slotTokens * slots > 2 ** 17 ? 4 : LAYERS, queue)
    attention.close()
    for (const address of owned) driver.free(address)
    return us
  }

  private random(address: number, bytes: number): number {
    const { driver } = this.device
    driver.launch(
      this.fill
        .setAll(address, bytes / 2, 1, 1.7)
        .grid(2048)
        .threads(256),
      this.stream,
    )
    driver.synchronizeStream(this.stream)
    return address
  }
}

function medianUs(
  { driver }: CudaDevice,
  stream: number,
  layers: number,
  queue: (layer: number) => void,
): number {
  driver.beginCapture(stream)
  for (let layer = 0; layer < layers; layer++) queue(layer)
  const graph = driver.endCapture(stream)
  const executable = driver.instantiate(graph)
  const [start, end] = [driver.createEvent(true), driver.createEvent(true)]
  const times: number[] = []
  for (let run = 0; run < RUNS + 3; run++) {
    driver.recordEvent(start, stream)
    driver.launchGraph(executable, stream)
    driver.recordEvent(end, stream)
    driver.synchronizeEvent(end)
    if (run >= 3) times.push((driver.elapsedMs(start, end) / layers) * 1e3)
  }
  driver.destroyEvent(start)
  driver.destroyEvent(end)
  driver.destroyExecutable(executable)
  driver.destroyGraph(graph)
  times.sort((a, b) => a - b)
  return present(times[times.length >> 1], 'a median')
}

interface Peer {
  version: string
  decode: (DecodeCase & PeerTimes)[]
  prefill: (PrefillCase & PeerTimes)[]
}

function askPeer(python: string): Peer {
  const { heads, kvHeads, headDim } = SHAPE
  const prefill = PREFILL.filter(({ history }) => history === 0)
  const job = JSON.stringify({ heads, kvHeads, headDim, runs: RUNS, decode: DECODE, prefill })
  const { stdout, stderr, error, status } = spawnSync(python, [PEER], {
    input: job,
    encoding: 'utf8',
    timeout: 180_000,
  })
  if (error || status !== 0) {
    const why = error?.message ?? stderr.trim().split('\n').at(-1) ?? `exit code ${status}`
    return { version: `no comparison: ${python}: ${why}`, decode: [], prefill: [] }
  }
  const { torch, ...times } = JSON.parse(stdout) as Omit<Peer, 'version'> & { torch: string }
  return { version: `torch ${torch}`, ...times }
}
