// Owns the question what it costs a request that another process answers than the interface's
// owner: the same prompt to the owner's engine and to one that joined, in turns.
//
//   node bench/join.ts [REQUESTS]

import { join } from 'node:path'
import { Host, twoHosts } from '../test/net/namespaces.ts'
import { temporaryDirectory } from '../test/support/temporary.ts'

const ROUNDS = 5
const KEY = new Uint8Array(16).fill(3)
const TENANT = {
  ...{ index: 1, name: 'one', keys: [KEY, KEY] as const },
  ...{ tokensPerSecond: 1e9, burstTokens: 1e9, maxRunning: 1000 },
}
const CLIENT = { host: '10.99.0.2', tenant: TENANT.index, key: KEY }

const requests = Number(process.argv[2] ?? 300)
const two = await twoHosts()
const other = new Host(two.server.namespace, 'veth-s', two.server.address)
try {
  const path = join(temporaryDirectory('join'), 'socket')
  const engine = { reply: { text: 'x', times: 1 } }
  await two.server.call('serve', {
    ...{ interface: 'veth-s', tenants: [TENANT], share: path },
    ...engine,
  })
  await other.call('join', path, engine)
  console.log('PROMPT  ENGINE  MS (MEDIAN)  CPU µs A REQUEST: OWNER  JOINED')
  for (const bytes of [100, 4096, 65_536]) {
    const rows = { own: [] as number[][], joined: [] as number[][] }
    for (let round = 0; round <= ROUNDS; round++) {
      for (const [index, name] of [
        [0, 'own'],
        [1, 'joined'],
      ] as const) {
        await two.server.call('only', 2, index)
        const row = await measure(bytes)
        // The first one warms up.
        if (round > 0) rows[name].push(row)
      }
    }
    for (const [name, all] of Object.entries(rows)) {
      const [ms, owner, joined] = [0, 1, 2].map((i) => median(all.map((row) => row[i]!)))
      console.log([bytes, name, ms!.toFixed(2), owner!.toFixed(0), joined!.toFixed(0)].join('  '))
    }
  }
} finally {
  await other.end()
  await two.remove()
}

async function measure(bytes: number): Promise<number[]> {
  const cpu = () => Promise.all([two.server, other].map((host) => host.call('cpuUs')))
  const request = { prompt: 'x'.repeat(bytes), maxTokens: 10 }
  const before = await cpu()
  const durations = await two.client.call('askMany', CLIENT, request, requests, 1)
  const after = await cpu()
  return [median(durations), ...after.map((us, i) => (us - before[i]!) / requests)]
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[values.length >> 1]!
}
