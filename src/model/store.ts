// Owns the local store: one directory a model with its files and its manifest, and the locks that
// keep two processes from fetching the same model.
//
//   ROOT/NAME/manifest.json   written last, so that what has one is whole
//   ROOT/NAME/FILE.gguf       ROOT/NAME.lock while a process pulls

import { existsSync, readFileSync, statSync } from 'node:fs'
import { link, mkdir, open, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { homedir } from 'node:os'
import { join } from 'node:path'
import { LatticeError } from '../errors.ts'
import { info } from '../log.ts'
import type { About } from './about.ts'

/** A model in the store. */
export interface Manifest {
  version: 1
  name: string
  /** As given to `lattice pull`. */
  source: string
  /** When it was pulled, ISO 8601. */
  date: string
  /** True where the files are the user's own: never copied, never removed. */
  inPlace: boolean
  files: ManifestFile[]
  about: About | null
}

export interface ManifestFile {
  /** A name in the model's directory, or an absolute path if in place. */
  path: string
  byteLength: number
  /** null for files used in place: their owner may change them. */
  sha256: string | null
  /** Together with the size, tells without hashing that the file is the one that was checked. */
  mtimeMs: number
}

const NAME = /^[a-z0-9][a-z0-9._-]{0,127}$/

/** A name for the store made of any text: lower case, and only letters, digits, dots and dashes. */
export function storeName(text: string): string {
  const name = text
    .toLowerCase()
    .replace(/[^a-z0-9._-]+/g, '-')
    .replace(/^[^a-z0-9]+/, '')
  return name.slice(0, 128) || 'model'
}

export class Store {
  readonly root: string

  /** @param root LATTICE_HOME, else lattice in XDG_DATA_HOME, else ~/.local/share/lattice */
  constructor(root: string = defaultRoot()) {
    this.root = join(root, 'models')
  }

  directory(name: string): string {
    if (NAME.test(name)) return join(this.root, name)
    throw new LatticeError('usage', `${JSON.stringify(name)} cannot name a model.`, {
      todo: 'Use lower-case letters, digits, dots, dashes and underscores.',
    })
  }

  /** A model's manifest; undefined when it is not there or not whole. */
  find(name: string): Manifest | undefined {
    if (!NAME.test(name)) return undefined
    const path = join(this.root, name, 'manifest.json')
    if (!existsSync(path)) return undefined
    try {
      const manifest = JSON.parse(readFileSync(path, 'utf8')) as Manifest
      if (manifest.version === 1 && Array.isArray(manifest.files)) return manifest
    } catch {
      // Fall through: a manifest that is no JSON is as bad as one of another version.
    }
    throw new LatticeError('model_not_found', `${path} cannot be read.`, {
      todo: `Remove the model with \`lattice rm ${name}\` and pull it again.`,
    })
  }

  /** Every model, by name. */
  async list(): Promise<Manifest[]> {
    const names = await readdir(this.root).catch(() => [])
    return names.toSorted().flatMap((name) => this.find(name) ?? [])
  }

  /** Names of models whose download has not ended, with the bytes that are there. */
  async incomplete(): Promise<{ name: string; byteLength: number }[]> {
    const entries = await readdir(this.root, { withFileTypes: true }).catch(() => [])
    const left = entries.filter(
      ({ name }) => NAME.test(name) && !existsSync(join(this.root, name, 'manifest.json')),
    )
    const directories = left.filter((entry) => entry.isDirectory())
    return Promise.all(
      directories.map(async ({ name }) => {
        const files = await readdir(join(this.root, name))
        const sizes = files.map((file) => allocatedBytes(join(this.root, name, file)))
        return { name, byteLength: sizes.reduce((sum, size) => sum + size, 0) }
      }),
    )
  }

  /** Absolute paths of a model's files. */
  paths({ name, files, inPlace }: Manifest): string[] {
    return files.map(({ path }) => (inPlace ? path : join(this.directory(name), path)))
  }

  async write(manifest: Manifest): Promise<void> {
    const directory = this.directory(manifest.name)
    await mkdir(directory, { recursive: true })
    const path = join(directory, 'manifest.json')
    const file = await open(`${path}.new`, 'w')
    await file.writeFile(`${JSON.stringify(manifest, undefined, 2)}\n`)
    await file.sync()
    await file.close()
    await rename(`${path}.new`, path)
  }

  /**
   * Removes a model, or what is left of one; files used in place stay.
   * @returns whether there was anything
   */
  async remove(name: string): Promise<boolean> {
    const directory = this.directory(name)
    if (!existsSync(directory)) return false
    await rm(directory, { recursive: true })
    return true
  }

  /** Runs `work` while no other process holds the name; waits, and says so, while one does. */
  async locked<T>(name: string, work: () => Promise<T>, signal?: AbortSignal): Promise<T> {
    await mkdir(this.root, { recursive: true })
    const path = `${this.directory(name)}.lock`
    let said = false
    while (!(await takeLock(path))) {
      if (!said) info(`Another process (${holderOf(path)}) is pulling ${name}; waiting for it …`)
      said = true
      await new Promise((resolve) => {
        setTimeout(resolve, LOCK_POLL_MS)
      })
      signal?.throwIfAborted()
    }
    try {
      return await work()
    } finally {
      await rm(path, { force: true })
    }
  }
}

/** What a file takes on disk: a partial file is sparse, and its length says nothing. */
function allocatedBytes(path: string): number {
  return (statSync(path, { throwIfNoEntry: false })?.blocks ?? 0) * 512
}

function defaultRoot(): string {
  const { LATTICE_HOME: home, XDG_DATA_HOME: data } = process.env
  return home || join(data || join(homedir(), '.local', 'share'), 'lattice')
}

const LOCK_POLL_MS = 250

/** A process by number and start time: numbers are used again, the two together are not. */
function identityOf(pid: number): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
    // Fields after the name, which is in parentheses and may hold anything; start time is the 22nd.
    const started = stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19]
    return `${pid} ${started}`
  } catch {
    return undefined
  }
}

function holderOf(path: string): string {
  try {
    return `process ${readFileSync(path, 'utf8').split(' ')[0]}`
  } catch {
    return 'it is just ending'
  }
}

/** Takes a lock that is free, or whose holder has died. */
async function takeLock(path: string): Promise<boolean> {
  const own = `${path}.${process.pid}`
  await writeFile(own, identityOf(process.pid) ?? `${process.pid}`)
  try {
    await link(own, path)
    return true
  } catch (thrown) {
    if ((thrown as NodeJS.ErrnoException).code !== 'EEXIST') throw thrown
    await breakStale(path)
    return false
  } finally {
    await rm(own, { force: true })
  }
}

async function breakStale(path: string): Promise<void> {
  const holder = await readFile(path, 'utf8').catch(() => undefined)
  if (holder === undefined || identityOf(Number(holder.split(' ')[0])) === holder) return
  // Moving is atomic: of two processes that see a dead holder, one moves its lock away. Should
  // the other have taken the lock in between, it gets it back.
  const aside = `${path}.stale.${process.pid}`
  await rename(path, aside).catch(() => undefined)
  const moved = await readFile(aside, 'utf8').catch(() => holder)
  if (moved !== holder) await link(aside, path).catch(() => undefined)
  await rm(aside, { force: true })
}

/** Size and time of change, as a manifest keeps them. */
export function fingerprint(path: string): { byteLength: number; mtimeMs: number } | undefined {
  const stat = statSync(path, { throwIfNoEntry: false })
  return stat && { byteLength: stat.size, mtimeMs: stat.mtimeMs }
}
