// Catches answers that leave past the account, and a program that stays when its process is killed.

import assert from 'node:assert/strict'
import { execFile, execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { inNamespace, twoHosts } from './namespaces.ts'

const skip = process.getuid?.() === 0 ? false : 'SKIPPED: network namespaces need root'
const HOST = fileURLToPath(new URL('egress-host.ts', import.meta.url))

test('tokens leave uncounted, or a killed server leaves its program', { skip }, async () => {
  const hosts = twoHosts()
  const { server: inside, serverInterface, client, clientInterface, serverAddress } = hosts
  const server = spawn(...inNamespace(inside, HOST, 'server', serverInterface), {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  try {
    const lines = createInterface({ input: server.stdout })[Symbol.asyncIterator]()
    assert.equal((await lines.next()).value, 'ready')
    assert.equal(attached(inside, serverInterface), '1')
    const asked = inNamespace(client, HOST, 'client', clientInterface, serverAddress)
    const { stdout } = await promisify(execFile)(...asked)
    server.stdin.write('\n')
    const account = JSON.parse(String((await lines.next()).value)) as Record<string, number>
    assert.equal(account['tokens'], Number(stdout))
    assert.equal(account['ended'], 8)
    assert.ok(account['tokens'] > 8 * 300 && account['bytes']! > 8 * 1500, stdout)
    server.kill('SIGKILL')
    await once(server, 'exit')
    assert.equal(attached(inside, serverInterface), '0')
  } finally {
    server.kill('SIGKILL')
    hosts.remove()
  }
})

/** How many programs see what an interface sends. */
function attached(namespace: string, interfaceName: string): string {
  const [command, args] = inNamespace(namespace, HOST, 'attached', interfaceName)
  return execFileSync(command, args, { encoding: 'utf8' }).trim()
}
