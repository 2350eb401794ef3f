// Catches an engine that forgets its prompts when it is ended or killed, or answers otherwise for
// having found them. The whole engine is real, the model is tiny.

import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { type Answer, ask, PROMPTS, startKept } from '../support/kept-engine.ts'
import { temporaryDirectory } from '../support/temporary.ts'
import { tinyLlama, writeTinyGguf } from '../support/tiny-gguf.ts'

const CHILD = fileURLToPath(new URL('../support/kept-engine.ts', import.meta.url))

const path = writeTinyGguf(tinyLlama())
const directory = temporaryDirectory('kv')
const key = join(directory, 'key')
writeFileSync(key, new Uint8Array(32).fill(1), { mode: 0o600 })

const start = () => startKept(path, join(directory, 'store'), key)

test('prompts are computed again after a restart, or answered otherwise', async () => {
  const first = await start()
  const before: Answer[] = []
  try {
    for (const prompt of PROMPTS) before.push(await ask(first.engine, prompt))
  } finally {
    await first.engine.close()
  }
  const again = await start()
  try {
    assert.ok(again.report.some((line) => /^store +3 prefixes of 960 tokens kept/.test(line)))
    assert.equal((await again.engine.snapshot()).tier?.kept, 3)
    for (const [i, prompt] of PROMPTS.entries()) {
      const { tokens, cached } = await ask(again.engine, prompt)
      assert.deepEqual(tokens, before[i]!.tokens)
      // All that may be reused: the last chunk is computed anew (decision 5).
      if (i === 0) assert.ok(cached === prompt.length - 64, `${cached} tokens were found`)
    }
  } finally {
    await again.engine.close()
  }
})

test('an engine that is killed leaves others than its prompts, or none', async () => {
  const store = join(directory, 'killed')
  const expected = await withoutStore()
  for (let life = 0; life < 3; life++) {
    // Each life finds what was durable in the last one, and is killed while it computes.
    const child = spawn(process.execPath, [CHILD, path, store, key, JSON.stringify(expected)])
    let [said, errors] = ['', '']
    child.stderr.on('data', (data) => (errors += data))
    child.stdout.on('data', (data) => {
      said += data
      if (said.includes('kept')) child.kill('SIGKILL')
    })
    const [code, signal] = (await once(child, 'close')) as [number | null, string | null]
    assert.equal(signal, 'SIGKILL', `the child ended with ${code}: ${errors}`)
    // It may have kept more before it was killed.
    const found = Number(/^found (\d+)/.exec(said)?.[1])
    assert.ok(life === 0 ? found === 0 : found >= 3, said)
  }
})

async function withoutStore(): Promise<number[][]> {
  const { engine } = await startKept(path, join(directory, 'unused'), key)
  try {
    const answers: number[][] = []
    for (const prompt of PROMPTS) answers.push((await ask(engine, prompt)).tokens)
    return answers
  } finally {
    await engine.close()
  }
}
