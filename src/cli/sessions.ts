// Owns what `lattice ps --sessions`, `offload` and `reload` show and do: the conversations that a
// server has in its cache, and moving one out of its memory or back.

import { Command } from 'commander'
import {
  addServerOptions,
  askServer,
  notLattice,
  type ServerAddress,
  whyNothing,
} from './server-client.ts'
import { formatBytes, formatMs, formatTable } from './table.ts'

/** As the server describes a session. */
interface SessionJson {
  id: string
  tokens: number
  where: string
  pages: number
  offloaded_pages: number
  bytes: number
  idle_ms: number
}

export function offloadCommand(): Command {
  const command = new Command('offload')
    .description("Moves a session's KV from a server's memory to its --kv-offload file.")
    .argument('<ID>', 'as `lattice ps --sessions` shows it')
  return addServerOptions(command).action((id: string, options: ServerAddress) => {
    return move(id, options, 'offload', 'is on disk', 'is on its way to disk')
  })
}

export function reloadCommand(): Command {
  const command = new Command('reload')
    .description("Brings a session's KV back into a server's memory, before it is needed.")
    .argument('<ID>', 'as `lattice ps --sessions` shows it')
  return addServerOptions(command).action((id: string, options: ServerAddress) => {
    return move(id, options, 'reload', 'is in memory', 'is on its way to memory')
  })
}

/** The table of sessions; as the server's JSON if asked. */
export async function sessionList(options: ServerAddress, json: boolean): Promise<string> {
  const answer = await askServer(options, '/v1/sessions')
  if (!Array.isArray(answer['data'])) throw notLattice(options.url, 200)
  if (json) return JSON.stringify(answer)
  if (answer['data'].length === 0) return whyNothing(options, 'No conversation is cached.')
  const right = true
  const columns = [
    { title: 'SESSION' },
    { title: 'WHERE' },
    { title: 'TOKENS', right },
    { title: 'PAGES', right },
    { title: 'ON DISK', right },
    { title: 'BYTES', right },
    { title: 'IDLE', right },
  ]
  const rows = (answer['data'] as SessionJson[]).map((session) => [
    session.id,
    session.where,
    String(session.tokens),
    String(session.pages),
    String(session.offloaded_pages),
    formatBytes(session.bytes),
    formatMs(session.idle_ms),
  ])
  return formatTable(columns, rows)
}

async function move(
  id: string,
  options: ServerAddress,
  how: 'offload' | 'reload',
  done: string,
  moving: string,
): Promise<void> {
  const path = `/v1/sessions/${encodeURIComponent(id)}/${how}`
  const { state } = await askServer(options, path, { method: 'POST' })
  process.stdout.write(`${id} ${state === 'done' ? done : moving}\n`)
}
