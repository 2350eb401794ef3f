// Owns what the kernels of the forward path do, in plain JavaScript on the mocked GPU's memory: the
// lowering of programs is tested without a GPU. bf16 is rounded where kernels store it.

import type { DecodeRows, PrefillSegments } from '../../src/backends/cuda/attention.ts'
import { GEMV_EPILOGUE } from '../../src/backends/cuda/gemv.ts'
import type { Attention } from '../../src/backends/cuda/lower-context.ts'
import type { KvLayout } from '../../src/kv/layout.ts'
import type { KernelLaunch } from '../../src/ffi/kernel-launch.ts'
import { type CublasLt, MATRIX, type MatrixLayout } from '../../src/ffi/cublaslt.ts'
import { viewMemory } from '../../src/ffi/libc.ts'
import type { MockCuda } from './mock-cuda.ts'

/** Heads of the model that runs. */
export interface MockModel {
  heads: number
  kvHeads: number
  headDim: number
  attentionScale: number
}

type Run = (a: readonly number[], grid: readonly number[]) => void

export class MockKernels {
  /** cuBLASLt, on the same memory. */
  readonly lt: CublasLt
  readonly cuda: MockCuda
  readonly model: MockModel

  constructor(cuda: MockCuda, model: MockModel) {
    this.cuda = cuda
    this.model = model
    this.lt = this.mockLt()
    const kernels: Record<string, Run> = {
      fetchStep: (a) => this.fetchStep(a),
      publishStep: (a) => this.publishStep(a),
      embed: (a, [rows]) => this.embed(a, rows!),
      normRow: (a, [rows]) => this.normRow(a, rows!),
      glu: (a, [, rows]) => this.glu(a, rows!),
      selectRows: (a, [rows]) => this.selectRows(a, rows!),
      addBias: (a, [rows]) => this.addBias(a, rows!),
      ropeAppend: (a, [rows]) => this.ropeAppend(a, rows!),
      sample: (a, [, outputs]) => this.sample(a, outputs!),
      skinny: (a) => this.skinny(a),
    }
    this.register(kernels)
  }

  protected register(kernels: Readonly<Record<string, Run>>): void {
    for (const [name, run] of Object.entries(kernels)) {
      this.cuda.behaviours.set(name, (launch: KernelLaunch) => {
        const args = launch.kinds.flatMap((kind, i) =>
          kind === 'bytes128'
            ? [...new Float64Array(viewMemory(launch.addressOfArgument(i), 16))]
            : [launch.get(i)],
        )
        const grid = launch.shape.slice(0, 3)
        return { touches: [], run: () => run(args, grid) }
      })
    }
  }

  protected bytes(address: number, count: number): ArrayBuffer {
    return Uint8Array.from(this.cuda.read(address, count)).buffer
  }

  protected bf16(address: number, count: number): Float32Array {
    const bits = new Uint16Array(this.bytes(address, count * 2))
    return new Float32Array(Uint32Array.from(bits, (b) => b << 16).buffer)
  }

  protected putBf16(address: number, values: ArrayLike<number>): void {
    const bits = new Uint32Array(Float32Array.from(values).buffer)
    const halves = Uint16Array.from(bits, (b) => (b + 0x7fff + ((b >>> 16) & 1)) >>> 16)
    this.cuda.write(address, new Uint8Array(halves.buffer))
  }

  /** Of a product's operand, by cudaDataType. */
  protected row(_type: number, address: number, count: number): Float32Array {
    return this.bf16(address, count)
  }

  private f32(address: number, count: number): Float32Array {
    return new Float32Array(this.bytes(address, count * 4))
  }

  i32(address: number, count = 1): Int32Array {
    return new Int32Array(this.bytes(address, count * 4))
  }

  private u64(address: number): number {
    return Number(new BigUint64Array(this.bytes(address, 8))[0])
  }

  private put(address: number, i: number, value: number, bytes = 4): void {
    const data = bytes === 8 ? BigUint64Array.of(BigInt(value)) : Int32Array.of(value)
    this.cuda.write(address + i * bytes, new Uint8Array(data.buffer))
  }

  private fetchStep(args: readonly number[]): void {
    const [ring, places, entries, segmentsAt, counter, last, base, stride, rows, segments] =
      args as number[]
    const [tokens, ...rowArrays] = args.slice(10, 15) as [number, ...number[]]
    const outArrays = args.slice(15, 19)
    const [outputRows, outputSlots, ...segmentArrays] = args.slice(19, 25) as number[]
    const start = ring! + (this.u64(counter!) % places!) * entries! * 20
    const entry = (i: number) => {
      const words = new Int32Array(viewMemory(start + i * 20, 20)).slice()
      return [...words] as [number, number, number, number, number]
    }
    for (let i = 0; i < segments!; i++) {
      const [firstRow, position, count, , region] = entry(segmentsAt! + i)
      const values = [firstRow, position, count, region]
      values.forEach((value, j) => this.put(segmentArrays[j]!, i, value))
    }
    for (let i = 0; i < rows!; i++) {
      const [token, position, slot, output, region] = entry(i)
      const row = slot < 0 ? [0, 0, 0, 0] : [position, base! + region * stride!, region]
      if (slot >= 0) row.push(position + 1)
      const sampled = slot < 0 ? 0 : this.i32(last! + slot * 4)[0]!
      this.put(tokens, i, slot < 0 ? 0 : token >= 0 ? token : sampled)
      row.forEach((value, j) => this.put(rowArrays[j]!, i, value, j === 1 ? 8 : 4))
      if (output < 0) continue
      row.forEach((value, j) => this.put(outArrays[j]!, output, value, j === 1 ? 8 : 4))
      this.put(outputRows!, output, i)
      this.put(outputSlots!, output, slot)
    }
  }

  private publishStep(args: readonly number[]): void {
    const [tokens, outputs, ring, places, entries, counter, done] = args as number[]
    const place = ring! + (this.u64(counter!) % places!) * entries! * 4
    new Int32Array(viewMemory(place, entries! * 4)).set(this.i32(tokens!, outputs))
    const next = this.u64(counter!) + 1
    this.put(counter!, 0, next, 8)
    new BigUint64Array(viewMemory(done!, 8))[0] = BigInt(next)
  }

  /** Greedily. */
  private sample(args: readonly number[], outputs: number): void {
    const [logits, vocab, slotOf, table, , , , , tokens, last] = args as number[]
    for (let o = 0; o < outputs; o++) {
      const [slot] = this.i32(slotOf! + o * 4)
      if (slot! < 0) continue
      const row = this.f32(logits! + o * vocab! * 4, vocab!)
      const best = row.indexOf(Math.max(...row))
      this.put(tokens!, o, best)
      this.put(last!, slot!, best)
      const [top] = this.i32(table! + slot! * 96 + 84)
      if (top! >= 0) this.report(row, best, top!, args.slice(10), o)
    }
  }

  private report(row: Float32Array, chosen: number, top: number, to: number[], o: number): void {
    const [ring, places, entries, steps] = to
    const words = viewMemory(ring! + ((this.u64(steps!) % places!) * entries! + o) * 164, 164)
    const max = Math.max(...row)
    const norm = max + Math.log(row.reduce((sum, x) => sum + Math.exp(x - max), 0))
    const best = [...row.keys()].toSorted((a, b) => row[b]! - row[a]! || a - b).slice(0, top)
    new Int32Array(words, 4).set(best)
    new Float32Array(words)[0] = row[chosen]! - norm
    new Float32Array(words, 84).set(best.map((token) => row[token]! - norm))
  }

  private embed([table, tokens, out, width, , scale]: readonly number[], rows: number): void {
    for (let r = 0; r < rows; r++) {
      const [token] = this.i32(tokens! + r * 4)
      const row = this.bf16(table! + token! * width! * 2, width!)
      this.putBf16(
        out! + r * width! * 2,
        row.map((x) => x * scale!),
      )
    }
  }

  protected normRow(args: readonly number[], rows: number): void {
    const [x, added, post, weight, out, width, eps] = args as [
      number,
      number,
      number,
      number,
      number,
      number,
      number,
    ]
    for (let r = 0; r < rows; r++) {
      const at = r * width * 2
      let row = this.bf16(x + at, width)
      if (added) {
        let sum = this.bf16(added + at, width)
        if (post) sum = normed(sum, this.f32(post, width), eps)
        this.putBf16(
          x + at,
          row.map((v, i) => v + sum[i]!),
        )
        row = this.bf16(x + at, width)
      }
      if (out) this.putBf16(out + at, normed(row, this.f32(weight, width), eps))
    }
  }

  protected glu([input, out, width, gelu]: readonly number[], rows: number): void {
    for (let r = 0; r < rows; r++) {
      const row = this.bf16(input! + r * 2 * width! * 2, 2 * width!)
      const made = row.subarray(0, width).map((g, i) => {
        const inner = Math.sqrt(2 / Math.PI) * (g + 0.044715 * g ** 3)
        const gate = gelu ? 0.5 * g * (1 + Math.tanh(inner)) : g / (1 + Math.exp(-g))
        return gate * row[width! + i]!
      })
      this.putBf16(out! + r * width! * 2, made)
    }
  }

  private selectRows([from, index, out, width]: readonly number[], rows: number): void {
    for (let r = 0; r < rows; r++) {
      const [row] = this.i32(index! + r * 4)
      this.putBf16(out! + r * width! * 2, this.bf16(from! + row! * width! * 2, width!))
    }
  }

  private addBias([out, bias, width, stride]: readonly number[], rows: number): void {
    const by = this.f32(bias!, width!)
    for (let r = 0; r < rows; r++) {
      const at = out! + r * stride! * 2
      this.putBf16(
        at,
        this.bf16(at, width!).map((x, i) => x + by[i]!),
      )
    }
  }

  protected ropeAppend(a: readonly number[], rows: number): void {
    const [q, k, v, qStride, kvStride, qOut, positions, bases, frequencies, dims] = a as number[]
    const [interleaved, magnitude, qNorm, kNorm, eps, heads, kvHeads, headDim] = a.slice(
      10,
    ) as number[]
    const [tokenStride, layerOffset] = a.slice(18) as number[]
    for (let r = 0; r < rows; r++) {
      const [position] = this.i32(positions! + r * 4)
      const base = this.u64(bases! + r * 8)
      if (base === 0) continue
      const head = (from: number, norm: number, turns: boolean) => {
        let x = this.bf16(from, headDim!)
        if (norm) x = normed(x, this.f32(norm, headDim!), eps!)
        if (!turns) return x
        const by = this.f32(frequencies!, dims! / 2)
        const out = x.slice()
        for (let p = 0; p < dims! / 2; p++) {
          const [i, j] = interleaved ? [2 * p, 2 * p + 1] : [p, p + dims! / 2]
          const [c, s] = [Math.cos(position! * by[p]!), Math.sin(position! * by[p]!)]
          out[i] = (x[i]! * c - x[j]! * s) * magnitude!
          out[j] = (x[i]! * s + x[j]! * c) * magnitude!
        }
        return out
      }
      const row = headDim! * 2
      for (let h = 0; q && h < heads!; h++) {
        const to = qOut! + (r * heads! + h) * row
        this.putBf16(to, head(q + r * qStride! * 2 + h * row, qNorm!, true))
      }
      const place = base + position! * tokenStride! + layerOffset!
      for (let h = 0; k && h < kvHeads!; h++) {
        this.putBf16(place + h * row, head(k + r * kvStride! * 2 + h * row, kNorm!, true))
        const to = place + (kvHeads! + h) * row
        this.putBf16(to, head(v! + r * kvStride! * 2 + h * row, 0, false))
      }
    }
  }

  /** skinny-hopper.cu, by the other kernels' means. */
  private skinny(a: readonly number[]): void {
    const [weight, , x, xBytes, rows, k, tokens, , , epilogue, out, outStride] = a as number[]
    const [gelu, positions, slots, frequencies, dims, magnitude] = a.slice(12) as number[]
    const [heads, kvHeads, headDim, tokenStride, layerOffset] = a.slice(18) as number[]
    const { store, add, glu, logits } = GEMV_EPILOGUE
    const rowBytes = 2 * rows!
    const scratch = this.cuda.allocate(Math.max(1, tokens! * rowBytes))
    for (let t = 0; t < tokens!; t++) {
      const input = this.bf16(x! + t * xBytes!, k!)
      const y = Float32Array.from({ length: rows! }, (_, r) =>
        this.bf16(weight! + r * k! * 2, k!).reduce((sum, w, i) => sum + w * input[i]!, 0),
      )
      const at = out! + t * outStride! * (epilogue === logits ? 4 : 2)
      if (epilogue === logits) this.cuda.write(at, new Uint8Array(y.buffer))
      else if (epilogue === store) this.putBf16(at, y)
      else if (epilogue === add) {
        const old = this.bf16(at, rows!)
        this.putBf16(
          at,
          y.map((v, i) => v + old[i]!),
        )
      } else this.putBf16(scratch + t * rowBytes, y)
    }
    if (epilogue === glu) this.glu([scratch, out!, rows! / 2, gelu!], tokens!)
    else if (epilogue === GEMV_EPILOGUE.rope) {
      const [key, value] = [heads!, heads! + kvHeads!].map((h) => scratch + h * headDim! * 2)
      const from = [scratch, key!, value!, rows!, rows!, out!, positions!, slots!, frequencies!]
      const how = [dims!, 0, magnitude!, 0, 0, 0, heads!, kvHeads!, headDim!]
      this.ropeAppend([...from, ...how, tokenStride!, layerOffset!], tokens!)
    }
    this.cuda.free(scratch)
  }

  /** One query row over tokens [first, length) of a slot's layer that starts at `keys`. */
  attend(
    q: number,
    out: number,
    keys: number,
    stride: number,
    first: number,
    length: number,
    scale: number,
  ): void {
    const { heads, kvHeads, headDim } = this.model
    const row = headDim * 2
    for (let h = 0; h < heads; h++) {
      const query = this.bf16(q + h * row, headDim)
      const kv = Math.floor(h / (heads / kvHeads))
      const scores: number[] = []
      for (let t = first; t < length; t++) {
        const key = this.bf16(keys + t * stride + kv * row, headDim)
        scores.push(scale * key.reduce((sum, x, i) => sum + x * query[i]!, 0))
      }
      const max = Math.max(...scores)
      const weights = scores.map((x) => Math.exp(x - max))
      const total = weights.reduce((sum, w) => sum + w, 0)
      const made = new Float64Array(headDim)
      weights.forEach((w, t) => {
        const value = this.bf16(keys + (first + t) * stride + (kvHeads + kv) * row, headDim)
        value.forEach((x, i) => (made[i]! += (w / total) * x))
      })
      this.putBf16(out + h * row, made)
    }
  }

  private mockLt(): CublasLt {
    const plans = new Map<number, { a: MatrixLayout; b: MatrixLayout; d: MatrixLayout }>()
    const algorithm = {
      block: { bytes: new Uint8Array(64) },
      address: 0,
      workspaceBytes: 0,
      waves: 1,
    }
    const lt = {
      path: 'mock',
      version: 1,
      createHandle: () => 1,
      destroyHandle: () => {},
      plan: (a: MatrixLayout, b: MatrixLayout, d: MatrixLayout) => {
        const descriptor = plans.size + 1
        plans.set(descriptor, { a, b, d })
        return { descriptor, a: 0, b: 0, d: 0 }
      },
      destroyPlan: () => {},
      algorithms: () => [algorithm],
      algorithm: () => algorithm,
      matmul: (
        _h: number,
        plan: { descriptor: number },
        _a: unknown,
        w: number,
        x: number,
        out: number,
        _ws: number,
        stream: number,
        accumulate = false,
      ) => {
        const { a, b, d } = plans.get(plan.descriptor)!
        const run = () => {
          for (let n = 0; n < b.columns; n++) {
            const size = b.type === MATRIX.e4m3 ? 1 : 2
            const row = this.row(b.type, x + n * b.leading * size, a.rows)
            const wide = d.type === 0
            const at = out + n * d.leading * (wide ? 4 : 2)
            const before = accumulate ? this.bf16(at, d.rows) : new Float32Array(d.rows)
            const made = before.map((sum, m) => {
              const weight = this.row(a.type, w + m * a.leading * size, a.rows)
              return sum + weight.reduce((total, y, i) => total + y * row[i]!, 0)
            })
            if (wide) this.cuda.write(at, new Uint8Array(made.buffer))
            else this.putBf16(at, made)
          }
        }
        this.cuda.queue(stream, { name: 'matmul', touches: [], run })
      },
    }
    return lt as unknown as CublasLt
  }
}

/** Attention over slots of a layout, one row at a time. */
export class MockAttention implements Attention {
  private readonly kernels: MockKernels
  private readonly base: number
  private readonly layout: KvLayout

  constructor(kernels: MockKernels, base: number, layout: KvLayout) {
    this.kernels = kernels
    this.base = base
    this.layout = layout
  }

  decode(stream: number, rows: DecodeRows, layer: number, window = Infinity): void {
    this.queue(stream, () => {
      for (let r = 0; r < rows.rows; r++) {
        const [slot] = this.kernels.i32(rows.slots + r * 4)
        const [length] = this.kernels.i32(rows.lengths + r * 4)
        if (length! > 0) this.row(rows, r, slot!, length!, layer, window)
      }
    })
  }

  prefill(stream: number, segments: PrefillSegments, layer: number, window = Infinity): void {
    this.queue(stream, () => {
      for (let s = 0; s < segments.segments; s++) {
        const { firstRows, starts, counts, slots } = segments
        const at = [firstRows, starts, counts, slots].map((a) => this.kernels.i32(a + s * 4)[0]!)
        const [row, start, count, slot] = at as [number, number, number, number]
        for (let t = 0; t < count; t++) {
          this.row(segments, row + t, slot, start + t + 1, layer, window)
        }
      }
    })
  }

  close(): void {}

  private row(
    { q, out }: { q: number; out: number },
    r: number,
    slot: number,
    length: number,
    layer: number,
    window: number,
  ): void {
    const { heads, headDim, attentionScale } = this.kernels.model
    const { slotBytes, layerStride, tokenStride } = this.layout
    const at = r * heads * headDim * 2
    const keys = this.base + slot * slotBytes + layer * layerStride
    const first = Math.max(0, length - window)
    this.kernels.attend(q + at, out + at, keys, tokenStride, first, length, attentionScale)
  }

  private queue(stream: number, run: () => void): void {
    this.kernels.cuda.queue(stream, { name: 'attention', touches: [], run })
  }
}

function normed(row: Float32Array, weight: Float32Array, eps: number): Float32Array {
  const rms = Math.sqrt(row.reduce((sum, x) => sum + x * x, 0) / row.length + eps)
  return row.map((x, i) => (x / rms) * weight[i]!)
}
