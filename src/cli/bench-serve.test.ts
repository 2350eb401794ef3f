// Owns the checks of `lattice bench serve` as a command: what it prints, keeps and refuses.

import assert from 'node:assert/strict'
import { mkdtempSync, readFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { FakeSseServer } from '../../test/support/fake-sse-server.ts'
import { benchServeCommand } from './bench-serve.ts'

async function run(argv: string): Promise<string> {
  const printed: string[] = []
  const log = console.log
  console.log = (line: string) => printed.push(line)
  try {
    const command = benchServeCommand()
      .exitOverride()
      .configureOutput({ outputError: () => {} })
    await command.parseAsync(argv.split(' '), { from: 'user' })
  } finally {
    console.log = log
  }
  return printed.join('\n')
}

test('an option does not reach the run, or the JSON lacks a documented key', async () => {
  const server = new FakeSseServer(() => ({ ttftMs: 1, gapMs: 1, tokens: 3 }))
  const url = await server.listen()
  const file = join(mkdtempSync(join(tmpdir(), 'lattice-bench-')), 'report.json')
  try {
    const text = await run(
      `--url ${url}/v1/ --num-prompts 3 --random-input-len 4 --random-output-len 3 --json ` +
        `--goodput ttft:1000 tpot:500 --percentiles 50,99.9 --max-concurrency 2 --output ${file}`,
    )
    const report = JSON.parse(text) as Record<string, unknown>
    assert.equal(server.served.length, 4, 'a warm-up and three')
    assert.deepEqual(JSON.parse(readFileSync(file, 'utf8')), report)
    assert.equal(report['request_goodput'], report['request_throughput'])
    assert.equal(report['max_concurrency'], 2)
    assert.equal(report['request_rate'], 'inf')
    const docs = readFileSync(new URL('../../docs/bench.md', import.meta.url), 'utf8')
    for (const key of Object.keys(report)) {
      const documented = key.replace(/^p[\d.]+_(ttft|tpot|itl|e2el)_ms$/, 'p99_$1_ms')
      assert.ok(docs.includes(`\`${documented}\``), `docs/bench.md lacks ${key}`)
    }

    const table = await run(`--url ${url} --num-prompts 2 --percentile-metrics itl`)
    assert.match(table, /requests completed, failed +2, 0/)
    assert.match(table, /inter-token latency +\d/)
    assert.doesNotMatch(table, /end-to-end/)
  } finally {
    server.close()
  }
})

test('a wrong option value starts a run', async () => {
  const wrong = [
    '--url nowhere',
    '--url ftp://x',
    '--num-prompts 0',
    '--request-rate 0',
    '--burstiness -1',
    '--random-range-ratio 1',
    '--percentile-metrics ttft,speed',
    '--percentiles 101',
    '--endpoint embeddings',
    '--goodput itl:3',
  ]
  for (const argv of wrong) {
    await assert.rejects(run(`--url http://127.0.0.1:1 ${argv}`), (error: unknown) => {
      const code = (error as { code: string }).code
      return code === 'commander.invalidArgument' || code === 'usage'
    })
  }
})
