// Owns `lattice gateway`: HTTP on this machine, datagrams to another one.

import { Command, InvalidArgumentError, Option } from 'commander'
import { ANSWER_TOKENS_DEFAULT } from './options.ts'
import { collect, parseCount, parseSize } from './parse.ts'
import { chooseKey, chooseTenant, parseServer } from './run-remote.ts'
import { chooseApiKeys, untilAsked } from './serve.ts'

interface GatewayFlags {
  to: string
  listen: { host: string; port: number }
  tenant?: number
  tenantKeyFile?: string
  apiKey?: string[]
  maxTokens: number
  readFirst: number
}

export function gatewayCommand(): Command {
  return new Command('gateway')
    .description(
      'Answers the OpenAI API by asking a server over datagrams. A large body is not read before ' +
        'the server has room for it.',
    )
    .requiredOption('--to <URL>', 'the server: lattice://HOST:PORT')
    .addOption(
      new Option('--listen <ADDRESS>', 'HOST:PORT to listen on')
        .argParser(parseListen)
        .default(parseListen('127.0.0.1:8080'), '127.0.0.1:8080'),
    )
    .option('--tenant <N>', 'as which of its tenants (or LATTICE_TENANT)', parseCount(0, 1023))
    .option('--tenant-key-file <FILE>', "file with the tenant's key (or LATTICE_TENANT_KEY)")
    .option('--api-key <KEY>', 'ask for this key; may be repeated (or LATTICE_API_KEY)', collect)
    .option(
      '--max-tokens <N>',
      'output tokens to ask for when a chat does not say, or before its body is read',
      parseCount(1, 1 << 20),
      ANSWER_TOKENS_DEFAULT,
    )
    .option('--read-first <SIZE>', 'read bodies up to this before asking', parseSize, 16 << 10)
    .action(run)
}

async function run(flags: GatewayFlags): Promise<void> {
  const [{ startGateway }, { LatticeClient }] = await Promise.all([
    import('../server/gateway/gateway.ts'),
    import('../net/client.ts'),
  ])
  const client = new LatticeClient({
    ...parseServer(flags.to, '--to'),
    tenant: chooseTenant(flags.tenant),
    key: chooseKey(flags.tenantKeyFile),
  })
  const gateway = await startGateway({
    client,
    ...flags.listen,
    apiKeys: chooseApiKeys(flags.apiKey, process.env['LATTICE_API_KEY']),
    maxTokens: flags.maxTokens,
    readFirstBytes: flags.readFirst,
  })
  process.stdout.write(`Forwarding ${gateway.url} to ${flags.to}\n`)
  await untilAsked()
  await gateway.close()
}

function parseListen(text: string): { host: string; port: number } {
  const match = /^(\[[0-9a-f:.]+\]|[^:[\]]+):(\d{1,5})$/i.exec(text)
  const port = Number(match?.[2])
  if (match?.[1] && port < 65536) return { host: match[1].replace(/^\[|\]$/g, ''), port }
  throw new InvalidArgumentError('Write an address such as 127.0.0.1:8080.')
}
