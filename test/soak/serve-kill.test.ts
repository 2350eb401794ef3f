// Catches a server that does not start again after a kill, answers otherwise for what it finds
// then, or has lost what was durable.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { killServer } from './serve-kill.ts'

test('a server that is killed under load loses a durable prompt, or answers another', async (t) => {
  const seed = Date.now() % 1e9
  t.diagnostic(`seed ${seed}; node test/soak/serve-kill.ts 100 ${seed} kills a hundred times`)
  const report = await killServer(5, seed)
  t.diagnostic(JSON.stringify(report))
  assert.ok(report.durable > 0 && report.asked > 0)
})
