// Owns a GPU that refuses launches as a real one does, and also those that touch memory that nobody
// has allocated, or write over what others still read. Kernels do nothing: only where they read and
// write is known, by their arguments.

import assert from 'node:assert/strict'
import { keyOf } from '../../src/backends/cuda/kernel-list.ts'
import type { KernelSource, ModuleCache } from '../../src/backends/cuda/module-cache.ts'
import type { CublasLt, MatrixLayout } from '../../src/ffi/cublaslt.ts'
import { MATRIX } from '../../src/ffi/cublaslt.ts'
import { NativeBlock } from '../../src/ffi/block.ts'
import { FUNCTION, type GpuDevice, type TensorMapTiled } from '../../src/ffi/cuda.ts'
import type { KernelLaunch } from '../../src/ffi/kernel-launch.ts'
import { viewMemory } from '../../src/ffi/libc.ts'
import { PHASE } from '../../src/backends/cuda/decode-step.ts'
import { GEMV_EPILOGUE } from '../../src/backends/cuda/gemv.ts'
import { MockCuda } from './mock-cuda.ts'
import type { Range } from './mock-gpu-memory.ts'

const UNASKED_BYTES = 48 << 10
/** A tensor map's type; others here are of two bytes. */
const BYTES = 0

const LARGE_BYTES = 32 << 20
/** All that is large of the host's memory. */
const HOST_BYTES = 2 ** 30
const HOST = new NativeBlock(HOST_BYTES)

interface Loaded {
  name: string
  defines: Readonly<Record<string, number>>
  asked: number
}

type Defines = Loaded['defines']

/** What a launch touches; arguments by position, blocks in each dimension. */
type Touched = (a: readonly number[], grid: readonly number[], d: Defines) => [number, number][]

const norm: Touched = ([x, added, post, weight, out, width, , scales = 0], [rows]) => {
  const bytes = rows! * width! * 2
  return [
    ...([x, added].map((at) => [at, bytes]) as [number, number][]),
    ...([post, weight].map((at) => [at, width! * 4]) as [number, number][]),
    [out!, scales ? bytes / 2 : bytes],
    [scales, rows! * 2],
  ]
}

const rotated: Touched = (a, [rows]) => {
  const [q, k, v, qStride, kvStride, out, positions, slots] = a as number[]
  const [heads, kvHeads, headDim] = a.slice(15, 18) as [number, number, number]
  const of = (at: number, stride: number, count: number): [number, number] => [
    at,
    ((rows! - 1) * stride + count * headDim) * 2,
  ]
  return [
    of(q!, qStride!, heads),
    of(k!, kvStride!, kvHeads),
    of(v!, kvStride!, kvHeads),
    of(q ? out! : 0, heads * headDim, heads),
    [positions!, rows! * 4],
    [slots!, rows! * 8],
  ]
}

const gated =
  (rowsAt: number): Touched =>
  ([from, out, width, , scales = 0], grid) => {
    const bytes = grid[rowsAt]! * width! * 2
    return [
      [from!, 2 * bytes],
      [out!, scales ? bytes / 2 : bytes],
    ]
  }

/** What a product writes in `tokens` rows at argument `at`; both kinds have their heads alike. */
function made(
  a: readonly number[],
  at: number,
  tokens: number,
  rows: number,
  epilogue: number,
): [number, number] {
  const [out = 0, stride = 0] = a.slice(at, at + 2)
  const [heads = 0, , headDim = 0] = a.slice(16, 19)
  const { glu, rope, logits } = GEMV_EPILOGUE
  const width = epilogue === glu ? rows / 2 : epilogue === rope ? heads * headDim : rows
  return [out, ((tokens - 1) * stride + width) * (epilogue === logits ? 4 : 2)]
}

const KERNELS: Readonly<Record<string, Touched>> = {
  embed: ([table, tokens, out, width, vocab], [rows]) => [
    [table!, width! * vocab! * 2],
    [tokens!, rows! * 4],
    [out!, rows! * width! * 2],
  ],
  normRow: norm,
  normRowE4m3: norm,
  normRowE4m3Wide: norm,
  glu: gated(1),
  gluE4m3: gated(0),
  gluE4m3Many: gated(0),
  selectRows: ([, index, out, width], [rows]) => [
    [index!, rows! * 4],
    [out!, rows! * width! * 2],
  ],
  addRows: ([a, b, out, count]) => [a, b, out].map((at) => [at!, count! * 16]),
  addBias: ([out, bias, width, stride], [rows]) => [
    [out!, ((rows! - 1) * stride! + width!) * 2],
    [bias!, width! * 4],
  ],
  ropeAppend: rotated,
  ropeAppendScaled: rotated,
  quantiseRows: ([from, out, scales, width], [rows]) => [
    [from!, rows! * width! * 2],
    [out!, rows! * width!],
    [scales!, rows! * 2],
  ],
  scaleProduct: ([raw, rowScales, tokenScales, out, width, rawStride, stride], [, rows]) => [
    [raw!, ((rows! - 1) * rawStride! + width!) * 2],
    [rowScales!, width! * 2],
    [tokenScales!, rows! * 2],
    [out!, ((rows! - 1) * stride! + width!) * 2],
  ],
  gemv: (a, _, { K = 0, TOKENS = 0, EPILOGUE = 0, E4M3 = 0 }) => [
    [a[0]!, a[1]! * K * (E4M3 ? 1 : 2)],
    [a[2]!, TOKENS * K * 2],
    made(a, 6, TOKENS, a[1]!, EPILOGUE),
  ],
  skinny: (a) => [made(a, 8, a[4]!, a[2]!, a[7]!)],
  attentionDecode: (a, _, { GROUP = 0, KV_HEADS = 0, HEAD_DIM = 0, WARPS = 0 }) => [
    ...[a[0]!, a[1]!].map(
      (at) => [at, a[6]! * GROUP * KV_HEADS * HEAD_DIM * 2] as [number, number],
    ),
    [a[14]!, a[6]! * KV_HEADS * WARPS * 4],
  ],
  sample: ([logits, vocab, slots, , , , , , tokens], [, outputs]) => [
    [logits!, outputs! * vocab! * 4],
    [slots!, outputs! * 4],
    [tokens!, outputs! * 4],
  ],
}

/** Where a product reads and where it writes: while one block writes, others still read. */
interface Product {
  from: Stretch
  to: Stretch
}

type Stretch = readonly [address: number, bytes: number]

function disjoint([a, aBytes]: Stretch, [b, bBytes]: Stretch): boolean {
  return a + aBytes <= b || b + bBytes <= a
}

/** Static shared memory, of kernels that also have other. */
function staticBytes({ name, defines: d }: Loaded): number {
  if (name === 'gemv') return (d['TOKENS'] ?? 0) * 33 * 4
  if (name === 'batchStep') return 2 * 128 + 8
  if (name !== 'decodeStep') return 0
  const { WARPS = 0, SLOTS = 0, TOKENS = 0, HEAD_DIM = 0 } = d
  return WARPS * SLOTS * 16 + TOKENS * WARPS * 4 + 2 * 80 + TOKENS * HEAD_DIM * 4 + 64
}

export class CheckedCuda extends MockCuda {
  /** By name of a kernel, how often it was launched. */
  readonly launches = new Map<string, number>()
  captures = 0
  /** Images that were asked for, as `keyOf` names them. */
  readonly wanted = new Set<string>()
  private readonly info: GpuDevice
  private readonly sources = new Map<number, Defines>()
  private readonly loaded = new Map<number, Loaded>()

  constructor(gpu: Partial<GpuDevice>) {
    super({ pageBytes: 1 << 16, totalBytes: 2 ** 38 })
    this.info = { ...super.devices()[0]!, ...gpu }
    this.behaviours.get = () => () => ({ touches: [], run: () => {} })
  }

  /** What is large is nobody's to look at: it has addresses only. */
  override allocate(bytes: number): number {
    if (bytes < LARGE_BYTES) return super.allocate(bytes)
    const address = this.reserve(Math.ceil(bytes / this.page) * this.page)
    this.allocations.set(address, { length: bytes } as Uint8Array)
    return address
  }

  override allocateHost(bytes: number): number {
    if (bytes < LARGE_BYTES) return super.allocateHost(bytes)
    assert.ok(bytes <= HOST_BYTES)
    return HOST.address
  }

  override freeHost(address: number): void {
    if (address !== HOST.address) super.freeHost(address)
  }

  override devices(): GpuDevice[] {
    return [this.info]
  }

  override loadModule(image: Uint8Array): number {
    const module = super.loadModule(image)
    this.sources.set(module, JSON.parse(Buffer.from(image).toString()) as Defines)
    return module
  }

  override functionOf(module: number, name: string): number {
    const kernel = super.functionOf(module, name)
    this.loaded.set(kernel, { name, defines: this.sources.get(module)!, asked: 0 })
    return kernel
  }

  override setFunctionAttribute(kernel?: number, attribute?: number, value?: number): void {
    if (attribute !== FUNCTION.dynamicSharedBytesMax) return
    const loaded = this.loaded.get(kernel!)!
    const most = this.info.sharedBytesPerBlock - staticBytes(loaded)
    assert.ok(value! <= most, `${loaded.name} may not ask for ${value} bytes`)
    loaded.asked = value!
  }

  override launch(launch: KernelLaunch, stream: number): void {
    const loaded = this.loaded.get(launch.kernel)!
    const { name, defines, asked } = loaded
    const [x, y, z, ...threads] = launch.shape as [number, number, number, ...number[]]
    const what = `${name} ${JSON.stringify(defines)}`
    assert.ok(x > 0 && x < 2 ** 31 && y > 0 && y < 2 ** 16 && z === 1, `${what}: ${x} × ${y}`)
    const count = threads.reduce((product, n) => product * n, 1)
    assert.ok(count > 0 && count <= 1024, `${what}: ${count} threads`)
    assert.ok(!launch.isProgrammatic || this.info.capability >= 90, `${what} may not begin early`)
    const dynamic = launch.dynamicSharedBytes
    const unasked = UNASKED_BYTES - staticBytes(loaded)
    assert.ok(
      dynamic <= Math.max(asked, unasked),
      `${what}: ${dynamic} bytes of ${asked} asked for`,
    )
    const touched = KERNELS[name]
    const args = launch.kinds.map((kind, i) => (kind === 'bytes128' ? 0 : launch.get(i)))
    for (const [address, bytes] of touched?.(args, [x, y], defines) ?? []) {
      if (address !== 0 && bytes > 0) this.within({ address, bytes }, what)
    }
    for (const { from, to } of this.productsOf(launch, args, loaded)) {
      this.within({ address: from[0], bytes: from[1] }, `${what} reads`)
      this.within({ address: to[0], bytes: to[1] }, `${what} writes`)
      assert.ok(disjoint(from, to), `${what} writes over its input`)
    }
    this.launches.set(name, (this.launches.get(name) ?? 0) + 1)
    super.launch(launch, stream)
  }

  override beginCapture(stream: number): void {
    this.captures++
    super.beginCapture(stream)
  }

  override encodeTensorMap(into: number, map: TensorMapTiled): void {
    const { address, dataType, dimensions, strides, box } = map
    const element = dataType === BYTES ? 1 : 2
    assert.equal(address % 16, 0)
    assert.ok(
      dimensions.every((n) => Number.isInteger(n) && n > 0 && n <= 2 ** 32),
      `${dimensions}`,
    )
    assert.ok(
      strides.every((n) => n % 16 === 0 && n < 2 ** 40),
      `strides ${strides}`,
    )
    assert.ok(box.every((n) => n > 0 && n <= 256) && box[0]! * element <= 128, `box ${box}`)
    const last = strides.reduce((sum, bytes, i) => sum + (dimensions[i + 1]! - 1) * bytes, 0)
    this.within({ address, bytes: last + dimensions[0]! * element }, `a map of ${dimensions}`)
    super.encodeTensorMap(into, map)
  }

  override fill8(address: number, _: number, bytes: number): void {
    this.within({ address, bytes }, 'fill8')
  }

  override fill16(address: number, _: number, count: number): void {
    this.within({ address, bytes: 2 * count }, 'fill16')
  }

  override fill32(address: number, _: number, count: number): void {
    this.within({ address, bytes: 4 * count }, 'fill32')
  }

  /** A library whose products only have to lie in memory. */
  products(): CublasLt {
    const plans: Record<'a' | 'b' | 'd', MatrixLayout>[] = []
    const algorithm = { block: { bytes: new Uint8Array(64) }, address: 0, workspaceBytes: 0 }
    const size = ({ type }: MatrixLayout) =>
      type === MATRIX.f32 ? 4 : type === MATRIX.e4m3 ? 1 : 2
    const bytesOf = (of: MatrixLayout) => ((of.columns - 1) * of.leading + of.rows) * size(of)
    const lt = {
      ...{ path: 'checked', version: 1, createHandle: () => 1, destroyHandle() {} },
      plan: (a: MatrixLayout, b: MatrixLayout, d: MatrixLayout) => ({
        ...{ descriptor: plans.push({ a, b, d }) - 1, a: 0, b: 0, d: 0 },
      }),
      destroyPlan() {},
      algorithms: () => [algorithm],
      algorithm: () => algorithm,
      matmul: (
        _: number,
        { descriptor }: { descriptor: number },
        _algorithm: unknown,
        weight: number,
        x: number,
        out: number,
      ) => {
        const { a, b, d } = plans[descriptor]!
        const what = `a product of [${a.columns}, ${a.rows}] and ${b.columns} tokens`
        this.within({ address: weight, bytes: bytesOf(a) }, what)
        this.within({ address: x, bytes: bytesOf(b) }, what)
        this.within({ address: out, bytes: bytesOf(d) }, what)
      },
    }
    return lt as unknown as CublasLt
  }

  /** Images that say what they are specialised for. */
  images(folder: string): ModuleCache {
    const get = (kernel: KernelSource) => {
      this.wanted.add(keyOf(kernel))
      return { image: Buffer.from(JSON.stringify(kernel.defines ?? {})) }
    }
    return { folder, get } as unknown as ModuleCache
  }

  private productsOf(launch: KernelLaunch, a: readonly number[], kernel: Loaded): Product[] {
    const { TOKENS = 0, K = 0, EPILOGUE = 0, HEADS = 0, HEAD_DIM = 0 } = kernel.defines
    if (kernel.name === 'gemv') {
      return [{ from: [a[2]!, TOKENS * K * 2], to: made(a, 6, TOKENS, a[1]!, EPILOGUE) }]
    }
    if (kernel.name === 'skinny') {
      const [x = 0] = new Float64Array(viewMemory(launch.addressOfArgument(1), 8))
      return [{ from: [x, a[4]! * a[3]! * 2], to: made(a, 8, a[4]!, a[2]!, a[7]!) }]
    }
    const few = kernel.name === 'decodeStep'
    if (!few && kernel.name !== 'batchStep') return []
    // As decode-step.ts and batch-table.ts write their tables.
    const [count, bytes] = few ? [a[1]!, 80] : [a[2]!, 128]
    const table = new DataView(this.read(a[0]!, count * bytes).buffer)
    const word = (at: number) => Number(table.getBigUint64(at, true))
    const tokens = few ? TOKENS : a[5]!
    return Array.from({ length: count }, (_, i) => i * bytes).flatMap((at) => {
      const integer = (i: number) => table.getInt32(at + (few ? 40 : 64) + i * 4, true)
      const kind = integer(0)
      if (kind === PHASE.attention) return []
      const [rows, k, stride] = few
        ? [integer(1), integer(2), integer(3)]
        : [integer(1) * 16, integer(10), integer(6)]
      const maps = few ? [] : new Float64Array(this.read(word(at + 16), 8).buffer)
      const heads = [HEADS, 0, HEAD_DIM]
      const to = made(
        [word(at + 24), stride, ...Array<number>(14), ...heads],
        0,
        tokens,
        rows,
        kind,
      )
      return [{ from: [few ? word(at + 8) : maps[0]!, tokens * k * 2], to }]
    })
  }

  private within({ address, bytes }: Range, what: string): void {
    for (const [start, memory] of this.allocations) {
      if (address >= start && address + bytes <= start + memory.length) return
    }
    assert.fail(`${what}: ${bytes} bytes from ${address} on are not one's own`)
  }
}
