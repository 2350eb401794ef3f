// Owns the crash test of the KV store: a process that writes to it is killed again and again, and
// the next one must find all that was durable, unchanged.
//
//   node test/soak/kv-store.ts [KILLS] [SEED]

import { spawn } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Random } from '../support/random.ts'
import { temporaryDirectory } from '../support/temporary.ts'

const CHILD = fileURLToPath(new URL('kv-store-child.ts', import.meta.url))

export interface Crashes {
  kills: number
  /** Prefixes that were durable, over all lives. */
  durable: number
  /** What the last life found, and how many torn records all lives found. */
  found: number
  torn: number
}

/** @throws Error with the child's own words if it finds something wrong, or nothing */
export async function crashStore(kills: number, seed: number): Promise<Crashes> {
  const random = new Random(seed)
  const directory = temporaryDirectory('crash')
  const ledgerPath = join(directory, 'ledger')
  const ledger = new Set<number>()
  const crashes = { kills: 0, durable: 0, found: 0, torn: 0 }
  for (; crashes.kills <= kills; crashes.kills++) {
    writeFileSync(ledgerPath, JSON.stringify([...ledger]))
    const last = crashes.kills === kills
    const lines = last ? 0 : random.below(60)
    await live([directory, `${seed + crashes.kills}`, ledgerPath], lines, (word, id, torn) => {
      if (word === 'durable') {
        crashes.durable++
        ledger.add(id)
      } else if (word === 'forgotten') ledger.delete(id)
      else {
        crashes.found = id
        crashes.torn += torn
      }
    })
  }
  crashes.kills--
  return crashes
}

/** Runs a child until it has said so many lines after `ready`, then kills it at once. */
function live(
  args: readonly string[],
  lines: number,
  hear: (word: string, value: number, more: number) => void,
): Promise<void> {
  const child = spawn(process.execPath, [CHILD, ...args], { stdio: ['ignore', 'pipe', 'pipe'] })
  let [text, errors, heard] = ['', '', -1]
  child.stderr.on('data', (data) => (errors += data))
  child.stdout.on('data', (data) => {
    text += data
    const whole = text.split('\n')
    text = whole.pop() ?? ''
    for (const line of whole) {
      const [word = '', value, more] = line.split(' ')
      // What it said before it died counts, however late it is heard.
      hear(word, Number(value), Number(more))
      heard++
    }
    if (heard >= lines) child.kill('SIGKILL')
  })
  return new Promise((resolve, reject) => {
    child.once('close', (code, signal) => {
      if (signal === 'SIGKILL' && heard >= 0) resolve()
      else reject(new Error(`the child ended with ${code ?? signal}: ${errors}`))
    })
  })
}

if (import.meta.main) {
  const [kills = '100', seed = `${Date.now() % 1e9}`] = process.argv.slice(2)
  console.log(`seed ${seed}`)
  console.log(JSON.stringify(await crashStore(Number(kills), Number(seed))))
}
