// Owns what the kernels around products of e4m3 do, in plain JavaScript on the mocked GPU's memory.

import type { MockCuda } from './mock-cuda.ts'
import { fromE4m3, quantised } from './e4m3.ts'
import { MockKernels, type MockModel } from './mock-kernels.ts'

export class MockE4m3Kernels extends MockKernels {
  constructor(cuda: MockCuda, model: MockModel) {
    super(cuda, model)
    this.register({
      quantiseRows: (a, [rows]) => this.quantiseRows(a, rows!),
      scaleProduct: (a, [, rows]) => this.scaleProduct(a, rows!),
      normRowE4m3: (a, [rows]) => this.normRowE4m3(a, rows!),
      normRowE4m3Wide: (a, [rows]) => this.normRowE4m3(a, rows!),
      gluE4m3: (a, [rows]) => this.gluE4m3(a, rows!),
      gluE4m3Many: (a, [rows]) => this.gluE4m3(a, rows!),
      ropeAppendScaled: (a, [rows]) => this.ropeAppendScaled(a, rows!),
    })
  }

  protected override row(type: number, address: number, count: number): Float32Array {
    if (type !== 28) return super.row(type, address, count)
    return Float32Array.from(new Uint8Array(this.bytes(address, count)), fromE4m3)
  }

  private quantiseRows([from, out, scales, width]: readonly number[], rows: number): void {
    for (let r = 0; r < rows; r++) {
      const { bytes, scale } = quantised(this.bf16(from! + r * width! * 2, width!))
      this.cuda.write(out! + r * width!, bytes)
      this.putBf16(scales! + r * 2, [scale])
    }
  }

  private scaleProduct(args: readonly number[], tokens: number): void {
    const [raw, rowScales, tokenScales, out, rows, rawStride, stride, accumulate] = args as number[]
    const by = this.bf16(rowScales!, rows!)
    for (let t = 0; t < tokens; t++) {
      const [token] = this.bf16(tokenScales! + t * 2, 1)
      const at = out! + t * stride! * 2
      const old = accumulate ? this.bf16(at, rows!) : new Float32Array(rows!)
      const sums = this.bf16(raw! + t * rawStride! * 2, rows!)
      this.putBf16(
        at,
        sums.map((x, i) => old[i]! + x * by[i]! * token!),
      )
    }
  }

  private normRowE4m3(args: readonly number[], rows: number): void {
    const [x, added, post, weight, out, width, eps, outScales, rowScales, tokenScales] =
      args as number[]
    this.between(
      rows,
      width!,
      width!,
      [added!, out!, outScales!, rowScales!, tokenScales!],
      (i, o) => this.normRow([x!, i, post!, weight!, o, width!, eps!], rows),
    )
  }

  private gluE4m3(args: readonly number[], rows: number): void {
    const [from, out, width, gelu, ...scales] = args as number[]
    this.between(rows, 2 * width!, width!, [from!, out!, ...scales], (i, o) =>
      this.glu([i, o, width!, gelu!], rows),
    )
  }

  private ropeAppendScaled(args: readonly number[], rows: number): void {
    const [q, k, v, stride] = args as number[]
    const { heads, kvHeads, headDim } = this.model
    const width = (heads + 2 * kvHeads) * headDim
    if (stride !== width) throw new Error('q, k and v lie side by side')
    this.between(rows, width, 0, [q!, 0, 0, ...args.slice(20)], (i) =>
      this.ropeAppend([i, i + k! - q!, i + v! - q!, ...args.slice(3, 20)], rows),
    )
  }

  /** Runs a plain kernel on input that was scaled, and quantises what it makes. */
  private between(
    rows: number,
    width: number,
    outWidth: number,
    [from, out, outScales, rowScales, tokenScales]: readonly number[],
    run: (from: number, out: number) => void,
  ): void {
    const bytes = rows * width * 2
    const scratch = this.cuda.allocate(2 * bytes + 16)
    const input = rowScales ? scratch : from!
    if (rowScales) {
      this.scaleProduct([from!, rowScales, tokenScales!, input, width, width, width, 0], rows)
    }
    const to = outScales ? scratch + bytes : out!
    run(input, to)
    if (outScales) this.quantiseRows([to, out!, outScales, outWidth], rows)
    this.cuda.free(scratch)
  }
}
