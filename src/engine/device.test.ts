// Catches a device that is not the one asked for, and a choice that is not explained.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { DeviceReport, GpuReport, PartReport } from '../backends/cuda/describe.ts'
import { LatticeError } from '../errors.ts'
import { chooseDevice } from './device.ts'

const GPU: DeviceReport = {
  index: 0,
  name: 'NVIDIA H100',
  uuid: 'GPU-1',
  memoryBytes: 80 * 2 ** 30,
  freeBytes: 79 * 2 ** 30,
  capability: 90,
  multiprocessors: 132,
  l2Bytes: 50 << 20,
  sharedBytesPerBlock: 227 << 10,
  virtualMemory: true,
  hostNumaNode: 0,
  hostPages: true,
  architecture: 'sm_90a',
}

type Describe = () => Promise<GpuReport>

function machine(missing: PartReport['part'][], devices: DeviceReport[]): Describe {
  const parts = (['driver', 'nvrtc', 'cublaslt'] as const).map((part) =>
    missing.includes(part)
      ? { part, title: `the ${part}`, found: false, problem: `No ${part}.`, todo: `Get ${part}.` }
      : { part, title: `the ${part}`, found: true, path: part, version: '13.0' },
  )
  const usable = missing.length === 0 && devices.some(({ problem }) => problem === undefined)
  const kernels = { folder: 'kernels', count: 0, bytes: 0 }
  return async () => ({ usable, parts, devices, includeFolders: [], kernels })
}

test('the CPU was asked for and is not what computes, or a GPU is looked for', async () => {
  const choice = await chooseDevice('cpu', () => assert.fail('looked for a GPU'))
  assert.deepEqual(choice, { device: 'cpu', reason: 'cpu, as asked' })
})

test('auto leaves a usable GPU idle, or does not say what it took', async () => {
  const choice = await chooseDevice('auto', machine([], [GPU]))
  const reason = 'cuda, since NVIDIA H100 can be used'
  assert.deepEqual(choice, { device: 'cuda', reason, gpu: GPU })
})

const reasons: [what: string, report: Describe, reason: RegExp, error: RegExp][] = [
  ['no driver', machine(['driver', 'nvrtc'], []), /there is no usable GPU driver/, /No driver/],
  ['no GPU', machine([], []), /the driver shows no GPU/, /shows no GPU/],
  ['no compiler', machine(['nvrtc'], [GPU]), /H100 is there, but the nvrtc is not/, /No nvrtc/],
  [
    'an old GPU',
    machine([], [{ ...GPU, name: 'NVIDIA T4', problem: 'it is too old' }]),
    /NVIDIA T4 is not supported: it is too old/,
    /NVIDIA T4 cannot be used/,
  ],
]
for (const [what, report, reason, error] of reasons) {
  test(`with ${what}, auto fails or is silent, or cuda falls back to the CPU`, async () => {
    const choice = await chooseDevice('auto', report)
    assert.equal(choice.device, 'cpu')
    assert.match(choice.reason, reason)
    await assert.rejects(chooseDevice('cuda', report), (thrown) => {
      assert.ok(thrown instanceof LatticeError && thrown.code === 'backend_unavailable')
      assert.match(thrown.message, error)
      assert.ok(thrown.todo)
      return true
    })
  })
}
