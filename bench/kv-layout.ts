// Owns the measurement behind the order of keys and values in a host slot: decode and prefill on
// both orders, taking turns. Usage: node bench/kv-layout.ts MODEL.gguf [ROUNDS] [--json]

import { CpuBackend } from '../src/backends/cpu/backend.ts'
import { StepBatch } from '../src/backends/backend.ts'
import { benchPrompt, median } from '../src/bench/cpu.ts'
import { allowedCpus } from '../src/ffi/libc.ts'
import { openModel } from '../src/model/load.ts'
import { computeCpus } from '../src/os/cpus.ts'

const [path = '', rounds = '5'] = process.argv.slice(2).filter((arg) => arg !== '--json')
const SLOTS = 16
const STEP = 512
const ORDERS = ['layer-major', 'token-major'] as const
const model = openModel(path)
const cpus = computeCpus(allowedCpus(), undefined)
const prompt = benchPrompt(2048, 1)
const batch = new StepBatch(STEP, SLOTS)

const sides = ORDERS.map((kvOrder) => {
  const options = { contextLength: 4096, maxSequences: SLOTS, stepTokens: STEP, cpus, kvOrder }
  const backend = new CpuBackend(model, options)
  const times = { prefill: [] as number[], 'decode 1 @ 2048': [] as number[] }
  return { kvOrder, backend, times: { ...times, 'decode 16 @ 512': [] as number[] } }
})

function timed(backend: CpuBackend): number {
  const start = performance.now()
  backend.launch(batch)
  return performance.now() - start
}

for (let round = 0; round < Number(rounds); round++) {
  for (const { backend, times } of sides) {
    let prefill = 0
    for (let at = 0; at < prompt.length; at += STEP) {
      batch.clear()
      batch.add(0, at, prompt, at, STEP, true)
      prefill += timed(backend)
    }
    times.prefill.push(prefill)
    for (let i = 0; i < 20; i++) {
      batch.clear()
      batch.add(0, prompt.length + i, [500], 0, 1, true)
      times['decode 1 @ 2048'].push(timed(backend))
    }
    for (let slot = 1; slot < SLOTS; slot++) {
      batch.clear()
      batch.add(slot, 0, prompt, 0, STEP, true)
      backend.launch(batch)
    }
    for (let i = 0; i < 10; i++) {
      batch.clear()
      for (let slot = 0; slot < SLOTS; slot++) batch.add(slot, STEP + i, [500], 0, 1, true)
      times['decode 16 @ 512'].push(timed(backend))
    }
  }
}
const report = sides.map(({ kvOrder, times, backend }) => {
  backend.close()
  const medians = Object.entries(times).map(([name, all]) => [`${name}_ms`, median(all)])
  return { order: kvOrder, ...(Object.fromEntries(medians) as Record<string, number>) }
})
if (process.argv.includes('--json')) console.log(JSON.stringify(report))
else console.table(report)
