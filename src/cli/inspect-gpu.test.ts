// Catches `lattice inspect gpu` that promises fp8 where there is none, or hides it.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { DeviceReport } from '../backends/cuda/describe.ts'
import { gpuText } from './inspect-gpu.ts'

function textOf(capability: number): string {
  const device: DeviceReport = {
    index: 0,
    name: 'NVIDIA GPU',
    uuid: 'GPU-1',
    memoryBytes: 80 * 2 ** 30,
    freeBytes: 79 * 2 ** 30,
    capability,
    multiprocessors: 108,
    l2Bytes: 40 << 20,
    sharedBytesPerBlock: 163 << 10,
    virtualMemory: true,
    hostNumaNode: 0,
    hostPages: true,
    architecture: `sm_${capability}`,
  }
  const kernels = { folder: 'kernels', count: 0, bytes: 0 }
  return gpuText({ usable: true, parts: [], devices: [device], includeFolders: [], kernels })
}

test('a GPU without fp8 has it, or one with fp8 has not', () => {
  const no = /fp8 \(--quantization fp8\): no, its compute capability is 8\.6, 8\.9 is needed/
  assert.match(textOf(86), no)
  for (const capability of [89, 90, 120]) assert.match(textOf(capability), /fp8\): yes\n/)
})
