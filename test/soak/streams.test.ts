import assert from 'node:assert/strict'
import { test } from 'node:test'
import { serveFake, soak } from './streams.ts'

test('200 streams, a fifth left at random: no error, no leak, flat memory', async (t) => {
  const fake = await serveFake()
  try {
    const report = await soak({ url: fake.url, clients: 200, seconds: 5, seed: 1 })
    t.diagnostic(JSON.stringify(report))
    assert.deepEqual(report.errors, [])
    assert.ok(report.finished > 200, 'hardly anything was served')
    const share = report.left / (report.finished + report.left)
    assert.ok(share > 0.1 && share < 0.3, `${share} of the clients left`)
  } finally {
    fake.process.kill()
  }
})
