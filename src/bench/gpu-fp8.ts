// Owns the measurement of `--quantization fp8` on a GPU: decode steps against reading weights of 8
// bits, whole requests, and a long prompt against what the tensor cores multiply of them.

import { quantiseLaunch } from '../backends/cuda/e4m3-rows.ts'
import { e4m3Weights } from '../backends/cuda/e4m3.ts'
import { Kernels } from '../backends/cuda/kernels.ts'
import { Matmuls } from '../backends/cuda/matmul.ts'
import { whyNotFp8 } from '../backends/cuda/quantization.ts'
import { loadCublasLt } from '../ffi/cublaslt.ts'
import { info } from '../log.ts'
import { dummyModel } from '../model/dummy.ts'
import { benchDecode, readBandwidth } from './gpu-decode.ts'
import { type GpuBench, gpuMs, randomBf16 } from './gpu-measure.ts'
import { rowKernels } from './gpu-profile.ts'
import { growth, MODEL, prefillFlops, profilePrompts, serve, withModel } from './gpu-serve.ts'

const DECODES = [
  { batch: 1, context: 1024, steps: 40 },
  { batch: 4, context: 1024, steps: 40 },
  { batch: 64, context: 576, steps: 40 },
  { batch: 256, context: 1600, steps: 24 },
] as const

/** The part `fp8` of `lattice bench gpu`. */
export function benchFp8(bench: GpuBench): void {
  const { device, modules, row } = bench
  const problem = whyNotFp8(device.info)
  if (problem !== undefined) return info(`no fp8 on ${device.info.name}: ${problem}`)
  const readGBs = readBandwidth(device, modules)
  const teraflops = matrixCeiling(bench)
  row('memory read by a plain kernel', readGBs, 'GB/s')
  row('a matrix product of e4m3, 8,192 cubed', teraflops, 'TFLOP/s')
  const model = dummyModel(MODEL)
  const profile = { teraflops }
  for (const of of DECODES) {
    const options = { quantization: 'fp8' } as const
    const one = benchDecode(device, modules, model, of, readGBs, { ...options, profile })
    const name = `${MODEL}, fp8, ${of.batch} × ${of.context}`
    const why = one.whyNotWhole
    const how = why === undefined ? '' : ` (a kernel a product: ${why})`
    row(`${name}: step${how}`, one.stepUs, 'µs', one.rooflineUs, 'reading weights and KV')
    row(`${name}: CPU a step`, one.cpuUs, 'µs')
    rowKernels(one.profile, name, row)
    if (why !== undefined) continue
    const parts = { ...options, wholeSteps: false }
    const apart = benchDecode(device, modules, model, of, readGBs, parts)
    row(`${name}: step, a kernel a product`, apart.stepUs, 'µs', apart.rooflineUs)
  }
  withModel(bench, 'fp8', (gpu) => {
    const prompt = { sequences: 1, promptTokens: () => 8192, outputTokens: 1 }
    serve(gpu, prompt)
    const { ms } = serve(gpu, prompt)
    row(`${MODEL}, fp8: a prompt of 8,192`, ms, 'ms')
    const share = (100 * prefillFlops(8192)) / ms / 1e9 / teraflops
    row(`${MODEL}, fp8: the same, of the product's rate`, share, '%')
    const named: GpuBench['row'] = (name, ...rest) =>
      row(name.replace(MODEL, `${MODEL}, fp8`), ...rest)
    const narrow = e4m3Weights(model, device.info)
    profilePrompts(gpu, { teraflops, readGBs }, named, narrow)
    for (const [sequences, tokens] of LOADS) growth(gpu, sequences, tokens, named)
  })
}

/** TFLOP/s of the matrix library's best algorithm for a large product of random e4m3. */
function matrixCeiling(bench: GpuBench): number {
  const { device, modules, stream } = bench
  const { driver, info } = device
  const kernels = new Kernels(device, modules)
  const size = 8192
  const bytes = 2 * size * size
  const memory = driver.allocate(2 * bytes + 2 * size)
  // The product goes where its operands were as bf16.
  const [out, weight, x] = [memory, memory + bytes, memory + bytes + size * size]
  randomBf16(bench, out, size * size)
  for (const to of [weight, x]) {
    const launch = quantiseLaunch(kernels.find, size).setAll(out, to, memory + 2 * bytes, size)
    driver.launch(launch.grid(size), stream)
  }
  driver.synchronizeStream(stream)
  const matmuls = new Matmuls(driver, loadCublasLt(), info, modules.folder)
  const product = { m: size, k: size, stride: size, float32: false, accumulate: false, e4m3: true }
  matmuls.tune(product, size, [weight], x, out)
  const ms = gpuMs(bench, 20, () => matmuls.run(product, size, size, weight, x, out, stream))
  matmuls.close()
  kernels.close()
  driver.free(memory)
  return (2 * size ** 3) / ms / 1e9
}

const LOADS = [
  [64, 512],
  [256, 64],
] as const
