// Owns models on the Hugging Face hub or a mirror of it (HF_ENDPOINT): which files a repository
// has, which of them make a model, and their hashes. Source: the hub's API documentation.

import { basename, join } from 'node:path'
import { LatticeError } from '../../errors.ts'
import { DOWNLOAD_ATTEMPTS } from '../../limits.ts'
import { isObject } from '../json.ts'
import { download } from './download.ts'
import type { FetchedFile } from './files.ts'
import { getJson, retrying } from './http.ts'

export interface HubTarget {
  directory: string
  sha256?: string | undefined
  signal?: AbortSignal | undefined
  retryBaseMs?: number | undefined
}

/** A file as the hub lists it. */
export interface HubFile {
  path: string
  byteLength: number | undefined
  /** Known for large files. */
  sha256: string | undefined
}

interface Listing {
  /** The commit: files are fetched from it even if the repository changes meanwhile. */
  commit: string
  files: HubFile[]
}

/**
 * Fetches the files of a model.
 * @param reference OWNER/REPO or OWNER/REPO/FILE
 * @throws LatticeError `download_failed`, `hash_mismatch`, `usage` when FILE must be chosen
 */
export async function fetchFromHub(reference: string, target: HubTarget): Promise<FetchedFile[]> {
  const [owner = '', repo = '', ...rest] = reference.split('/')
  const repository = `${owner}/${repo}`
  const listing = await list(repository, target)
  const chosen = chooseFiles(repository, listing.files, rest.join('/') || undefined)
  const fetched: FetchedFile[] = []
  for (const file of chosen) {
    const base = `${endpoint()}/${repository}/resolve/${listing.commit}`
    const { byteLength } = file
    fetched.push(
      await download({
        url: `${base}/${file.path.split('/').map(encodeURIComponent).join('/')}`,
        headers: authorization(),
        signal: target.signal,
        path: join(target.directory, basename(file.path)),
        label: basename(file.path),
        sha256: (chosen.length === 1 ? target.sha256 : undefined) ?? file.sha256,
        byteLength,
        retryBaseMs: target.retryBaseMs,
      }),
    )
  }
  return fetched
}

function endpoint(): string {
  return (process.env['HF_ENDPOINT'] ?? 'https://huggingface.co').replace(/\/+$/, '')
}

function authorization(): Record<string, string> {
  const token = process.env['HF_TOKEN']
  return token ? { authorization: `Bearer ${token}` } : {}
}

async function list(repository: string, target: HubTarget): Promise<Listing> {
  const url = `${endpoint()}/api/models/${repository}?blobs=true`
  const retry = retrying(DOWNLOAD_ATTEMPTS, target.retryBaseMs)
  const json = await getJson({ url, headers: authorization(), signal: target.signal }, retry)
  const siblings = isObject(json) ? json['siblings'] : undefined
  if (!isObject(json) || !Array.isArray(siblings)) {
    throw new LatticeError('download_failed', `${url} does not answer as a hub does.`, {
      todo: 'Check HF_ENDPOINT.',
    })
  }
  const commit = typeof json['sha'] === 'string' ? json['sha'] : 'main'
  return { commit, files: siblings.filter(isObject).flatMap(hubFile) }
}

function hubFile(sibling: Record<string, unknown>): HubFile[] {
  const { rfilename, size, lfs } = sibling
  if (typeof rfilename !== 'string') return []
  const sha256 = isObject(lfs) && typeof lfs['sha256'] === 'string' ? lfs['sha256'] : undefined
  return [{ path: rfilename, byteLength: typeof size === 'number' ? size : undefined, sha256 }]
}

const SPLIT = /^(?<stem>.*)-\d{5}-of-(?<count>\d{5})\.gguf$/

/**
 * The files that make the model: the named one (with the other parts of a split one), the only
 * GGUF there is, or the safetensors files with what belongs to them.
 */
export function chooseFiles(
  repository: string,
  files: readonly HubFile[],
  wanted: string | undefined,
): HubFile[] {
  if (wanted !== undefined) {
    const named = withParts(files, wanted)
    if (named.length > 0) return named
    throw choice('download_failed', `hf:${repository} has no file ${wanted}`, files)
  }
  const ggufs = files.filter(
    ({ path }) => path.endsWith('.gguf') && !/mmproj/i.test(basename(path)),
  )
  const models = new Map(
    ggufs.map(({ path }) => [SPLIT.exec(path)?.groups?.['stem'] ?? path, path]),
  )
  const [only] = models.values()
  if (only !== undefined && models.size === 1) return withParts(files, only)
  if (models.size > 1) throw choice('usage', `hf:${repository} has ${models.size} models`, ggufs)
  const plain = files.filter(({ path }) => SAFETENSORS_SET.test(path))
  if (plain.some(({ path }) => path.endsWith('.safetensors'))) return plain
  throw choice('download_failed', `hf:${repository} has neither GGUF nor safetensors`, files)
}

/** Files in the repository's root that make a safetensors model. */
const SAFETENSORS_SET = new RegExp(
  '^(?:model(?:-\\d{5}-of-\\d{5})?\\.safetensors|model\\.safetensors\\.index\\.json' +
    '|(?:config|generation_config|tokenizer|tokenizer_config|chat_template)\\.json' +
    '|chat_template\\.jinja)$',
)

function withParts(files: readonly HubFile[], path: string): HubFile[] {
  const { stem, count } = SPLIT.exec(path)?.groups ?? {}
  return files.filter((file) => {
    const groups = SPLIT.exec(file.path)?.groups
    if (stem === undefined) return file.path === path
    return groups?.['stem'] === stem && groups['count'] === count
  })
}

const SHOWN = 40

function choice(code: 'usage' | 'download_failed', what: string, files: readonly HubFile[]) {
  const paths = files.map(({ path }) => path).filter((path) => /\.(gguf|safetensors)$/.test(path))
  const shown = paths.slice(0, SHOWN).join(', ')
  const there = paths.length > 0 ? ` It has: ${shown}${paths.length > SHOWN ? ' …' : ''}.` : ''
  return new LatticeError(code, `${what}.${there}`, {
    todo: 'Name one: hf:OWNER/REPO/FILE.',
    details: { models: paths.length },
  })
}
