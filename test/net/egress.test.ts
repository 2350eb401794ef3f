// Catches answers that leave past the account, and a program that stays when its process is killed.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Host, twoHosts, WITHOUT_ROOT } from './namespaces.ts'

const KEY = new Uint8Array(16).fill(3)
const TENANT = {
  index: 1,
  name: 'one',
  keys: [KEY, KEY] as const,
  tokensPerSecond: 1e6,
  burstTokens: 1e9,
  maxRunning: 100,
  egress: { priority: 0, bytesPerSecond: 0 } as const,
}

test('tokens leave uncounted, or a killed server counts on', { skip: WITHOUT_ROOT }, async (t) => {
  const hosts = await twoHosts()
  const { client, server } = hosts
  t.after(() => hosts.remove())
  await server.call('serve', {
    interface: server.link,
    tenants: [TENANT],
    reply: { text: 'word ', times: 300 },
  })
  assert.equal(await server.call('accountants', server.link), 1)
  const to = { host: server.address, tenant: TENANT.index, key: KEY }
  const answers = await Promise.all(
    Array.from({ length: 8 }, () => client.call('ask', to, { prompt: 'Hi', maxTokens: 5000 })),
  )
  const outputs = answers.reduce((sum, { usage }) => sum + (usage?.outputTokens ?? 0), 0)
  const sent = (await server.call('status'))?.tenants[0]?.sent
  assert.ok(outputs > 8 * 1500 && sent)
  assert.equal(sent.tokens, outputs)
  assert.equal(sent.ended, 8)
  assert.ok(sent.bytes > 8 * 1500 * 5, 'less than the ids and the text')
  const { namespace, link, address } = server
  await server.end('SIGKILL')
  const after = new Host(namespace, link, address)
  t.after(() => after.end())
  assert.equal(await after.call('accountants', link), 0)
})
