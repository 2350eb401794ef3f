// Owns the measurement of attention on a GPU: decode against the bandwidth of memory, prefill in
// operations a second, both against PyTorch's SDPA where Python has torch.

import { present } from '../assert.ts'
import { type AttentionShape, CudaAttention } from '../backends/cuda/attention.ts'
import { Kernels } from '../backends/cuda/kernels.ts'
import { addressOf } from '../ffi/block.ts'
import { KernelLaunch } from '../ffi/kernel-launch.ts'
import { info } from '../log.ts'
import { readBandwidth } from './gpu-decode.ts'
import { type GpuBench, gpuMs } from './gpu-measure.ts'
import { askPython } from './python-peer.ts'

/** Llama 3.1 8B's: 4 KiB a token and layer, 128 KiB from a token to the next. */
const SHAPE: AttentionShape = { heads: 32, kvHeads: 8, headDim: 128, scale: 128 ** -0.5 }
const LAYERS = 32
const TOKEN_BYTES = 2 * SHAPE.kvHeads * SHAPE.headDim * 2
const TOKEN_STRIDE = LAYERS * TOKEN_BYTES
const RUNS = 21
const WARM = 3

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
type PeerTimes = Readonly<Record<'cudnn' | 'flash', number | null>>

interface Peer {
  torch: string
  decode: readonly (DecodeCase & PeerTimes)[]
  prefill: readonly (PrefillCase & PeerTimes)[]
}

/** PyTorch's rows are left out, with a line in the log, where python3 has no torch. */
export function benchAttention(bench: GpuBench): void {
  const { device, row } = bench
  const gigabytes = readBandwidth(device, bench.modules)
  const attention = new AttentionBench(bench)
  const decode = DECODE.map((of) => ({ of, us: attention.decode(of) }))
  const prefill = PREFILL.map((of) => ({ of, us: attention.prefill(of) }))
  attention.close()
  const peer = askPeer()
  for (const { of, us } of decode) {
    const name = `decode ${of.batch} × ${of.context.toLocaleString('en')}`
    const floor = (of.batch * of.context * TOKEN_BYTES) / gigabytes / 1e3
    if (us === undefined) info(`${name}: its KV does not fit in the GPU's free memory`)
    else row(name, us, 'µs', floor, 'reading its KV')
    const theirs = peer?.decode.find((p) => p.batch === of.batch && p.context === of.context)
    for (const [backend, peerUs] of timesOf(theirs)) {
      row(`${name}, PyTorch's ${backend}`, peerUs, 'µs', floor, 'reading its KV')
    }
  }
  for (const { of, us } of prefill) {
    const after = of.history ? ` after ${of.history.toLocaleString('en')}` : ''
    const name = `prefill ${of.batch} × ${of.tokens.toLocaleString('en')}${after}`
    const rate = (time: number): number => operations(of) / time / 1e6
    const theirs = peer?.prefill.find((p) => p.batch === of.batch && p.tokens === of.tokens)
    const times = of.history ? [] : timesOf(theirs)
    if (times.length === 0) row(name, rate(us), 'TFLOP/s')
    for (const [backend, peerUs] of times) {
      row(name, rate(us), 'TFLOP/s', rate(peerUs), `PyTorch's ${backend}`)
    }
  }
}

function timesOf(times: PeerTimes | undefined): [string, number][] {
  const { cudnn, flash } = times ?? { cudnn: null, flash: null }
  return [
    ...(cudnn ? [['cuDNN', cudnn] as [string, number]] : []),
    ...(flash ? [['FlashAttention 2', flash] as [string, number]] : []),
  ]
}

/** Multiplications and additions of both products, without what the causal mask hides. */
function operations({ batch, tokens, history }: PrefillCase): number {
  const seen = tokens * history + (tokens * tokens) / 2
  return 4 * batch * SHAPE.heads * SHAPE.headDim * seen
}

class AttentionBench {
  private readonly bench: GpuBench
  private readonly kernels: Kernels
  private readonly fill: KernelLaunch

  constructor(bench: GpuBench) {
    this.bench = bench
    this.kernels = new Kernels(bench.device, bench.modules)
    const fill = this.kernels.find('step.cu', 'fillRandom')
    this.fill = new KernelLaunch(fill, ['u64', 'u64', 'u32', 'f32'])
  }

  /** @returns undefined if there is no room */
  decode({ batch, context }: DecodeCase): number | undefined {
    const { freeBytes } = this.bench.device.driver.memoryInfo()
    if (batch * context * TOKEN_STRIDE > freeBytes - 2 ** 30) return undefined
    return this.measure(batch, context, batch, (attention, q, out, put) => {
      const slots = put(Int32Array.from({ length: batch }, (_, i) => (i * 37) % batch))
      const lengths = put(new Int32Array(batch).fill(context))
      return (layer) =>
        attention.decode(this.bench.stream, { q, out, slots, lengths, rows: batch }, layer)
    })
  }

  prefill({ batch, tokens, history }: PrefillCase): number {
    return this.measure(batch, history + tokens, batch * tokens, (attention, q, out, put) => {
      const each = (value: (i: number) => number): number =>
        put(Int32Array.from({ length: batch }, (_, i) => value(i)))
      const segments = {
        ...{ q, out, firstRows: each((i) => i * tokens), starts: each(() => history) },
        ...{ counts: each(() => tokens), slots: each((i) => i), segments: batch },
      }
      return (layer) => attention.prefill(this.bench.stream, segments, layer)
    })
  }

  close(): void {
    this.kernels.close()
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
    const { device, modules, stream } = this.bench
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
    const us = medianUs(this.bench, slotTokens * slots > 2 ** 17 ? 4 : LAYERS, queue)
    attention.close()
    for (const address of owned) driver.free(address)
    return us
  }

  private random(address: number, bytes: number): number {
    const { driver } = this.bench.device
    driver.launch(
      this.fill
        .setAll(address, bytes / 2, 1, 1.7)
        .grid(2048)
        .threads(256),
      this.bench.stream,
    )
    driver.synchronizeStream(this.bench.stream)
    return address
  }
}

/** Microseconds a layer: the median over replays of a graph of several. */
function medianUs(bench: GpuBench, layers: number, queue: (layer: number) => void): number {
  const { device, stream } = bench
  const { driver } = device
  driver.beginCapture(stream)
  for (let layer = 0; layer < layers; layer++) queue(layer)
  const graph = driver.endCapture(stream)
  const executable = driver.instantiate(graph)
  const replay = (): void => driver.launchGraph(executable, stream)
  gpuMs(bench, WARM, replay)
  const ms = gpuMs(bench, RUNS, replay)
  driver.destroyExecutable(executable)
  driver.destroyGraph(graph)
  return (ms / layers) * 1e3
}

function askPeer(): Peer | undefined {
  const { heads, kvHeads, headDim } = SHAPE
  const prefill = PREFILL.filter(({ history }) => history === 0)
  const cases = { heads, kvHeads, headDim, runs: RUNS, decode: DECODE, prefill }
  return askPython('attention-sdpa.py', 'PyTorch', cases)
}
