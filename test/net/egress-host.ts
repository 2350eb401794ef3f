// Owns one side of the egress test, run in its namespace: a server over datagrams of a fake engine
// that prints what it accounted for whenever it reads a line, a client of it,
// or a look at what is attached.

import { createInterface } from 'node:readline'
import { ATTACH, attachedPrograms } from '../../src/ffi/bpf-link.ts'
import { interfaceIndex } from '../../src/ffi/xdp-socket.ts'
import { LatticeClient } from '../../src/net/client.ts'
import { DatagramServer } from '../../src/net/datagram-server.ts'
import { Ingress } from '../../src/net/ingress.ts'
import { FakeEngine } from '../support/fake-engine.ts'
import { fakeTokenizer } from '../support/fake-tokenizer.ts'

const [side = '', interfaceName = '', address = ''] = process.argv.slice(2)
const TENANT = 1
const key = new Uint8Array(16).fill(3)

if (side === 'server') await serve()
else if (side === 'attached') {
  console.log(attachedPrograms(interfaceIndex(interfaceName), ATTACH.tcxEgress))
} else await ask()

async function serve(): Promise<void> {
  const engine = new FakeEngine({ contextLength: 1 << 16, reply: () => 'word '.repeat(300) })
  const server = await DatagramServer.start({
    engine,
    tokenizer: fakeTokenizer(),
    template: undefined,
    interfaceName,
    queue: 0,
    mode: 'copy',
    busyPollBudget: 0,
    tenants: [
      {
        index: TENANT,
        name: 'tenant',
        keys: [key, key],
        tokensPerSecond: 1e6,
        burstTokens: 1e9,
        maxRunning: 100,
        egress: { priority: 0, bytesPerSecond: 0 },
      },
    ],
    maxRunning: 100,
    port: 7411,
    onFailure: (error) => console.error(error),
  })
  console.log('ready')
  for await (const _ of createInterface({ input: process.stdin })) {
    const account = server.egress.tenant(TENANT)
    console.log(
      JSON.stringify(account, (_name, value) =>
        typeof value === 'bigint' ? Number(value) : value,
      ),
    )
  }
}

async function ask(): Promise<void> {
  // A veth hands over what XDP sends only to an interface that has a program itself.
  const passing = Ingress.load({ port: 1 })
  passing.program.attachXdp(interfaceIndex(interfaceName))
  const client = new LatticeClient({ host: address, tenant: TENANT, key })
  const counts = await Promise.all(
    Array.from({ length: 8 }, async () => {
      const answer = client.generate({ prompt: 'Hi', maxTokens: 5000 })
      let next = await answer.next()
      while (!next.done) next = await answer.next()
      // With the one that ends it, which has no text.
      return next.value.outputTokens
    }),
  )
  console.log(counts.reduce((sum, count) => sum + count, 0))
  process.exit()
}
