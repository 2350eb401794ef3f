// Catches a store that loses what was durable, or gives something else, when its process is killed.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { crashStore } from './kv-store.ts'

test('kill -9 loses a durable prefix, or changes one', async (t) => {
  const seed = Date.now() % 1e9
  t.diagnostic(`seed ${seed}; node test/soak/kv-store.ts 100 ${seed} kills a hundred times`)
  const crashes = await crashStore(5, seed)
  t.diagnostic(JSON.stringify(crashes))
  assert.ok(crashes.durable > 0)
})
