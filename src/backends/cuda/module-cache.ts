// Owns compiled kernels: kernels/*.cu are compiled for a GPU at first use and kept as files, named
// by a hash of all that they were made of. With a filled cache no compiler is needed.

import { createHash, randomUUID } from 'node:crypto'
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { homedir } from 'node:os'
import { join } from 'node:path'
import { cudaIncludeFolders } from '../../ffi/cuda-libraries.ts'
import { loadNvrtc, type Nvrtc } from '../../ffi/nvrtc.ts'

/** Where the sources lie. */
export const KERNELS_FOLDER = join(import.meta.dirname, '..', '..', '..', 'kernels')

/** Options of every compile. */
const OPTIONS = ['--std=c++17']

export interface KernelSource {
  /** A file of the sources' folder, such as `attention-decode.cu`. */
  file: string
  /** Macros by name: sizes that a kernel is specialised for. */
  defines?: Readonly<Record<string, string | number>>
  /** More options of the compiler. */
  options?: readonly string[]
}

export interface CompiledKernel {
  /** A cubin. */
  image: Uint8Array
  /** Undefined if it came from the cache. */
  log: string | undefined
}

export class ModuleCache {
  readonly folder: string
  readonly sources: string
  /** Why compiled kernels cannot be kept, if they cannot: every start compiles them again. */
  unkept: string | undefined
  private nvrtc: Nvrtc | undefined
  private headers: string | undefined

  /** @param folder of compiled kernels; may be deleted at any time */
  constructor(folder = cacheFolder(), sources = KERNELS_FOLDER) {
    this.folder = folder
    this.sources = sources
  }

  /**
   * A kernel file's machine code.
   * @throws LatticeError `backend_unavailable` without a compiler, `kernel_compile_failed`
   */
  get(kernel: KernelSource, architecture: string): CompiledKernel {
    const { path, source, options } = this.place(kernel, architecture)
    const image = readIfThere(path)
    if (image !== undefined) return { image, log: undefined }
    const compiled = this.compiler().compile({
      name: kernel.file,
      source,
      architecture,
      options,
      includeFolders: [this.sources, ...cudaIncludeFolders()],
    })
    this.keep(path, compiled.image)
    return compiled
  }

  /** Whether no compiler is needed for it. */
  has(kernel: KernelSource, architecture: string): boolean {
    return existsSync(this.place(kernel, architecture).path)
  }

  /** Where a kernel is kept, and what it is made of. */
  private place(kernel: KernelSource, architecture: string) {
    const source = readFileSync(join(this.sources, kernel.file), 'utf8')
    const options = [
      ...OPTIONS,
      ...Object.entries(kernel.defines ?? {}).map(([name, value]) => `-D${name}=${value}`),
      ...(kernel.options ?? []),
    ]
    const parts = [kernel.file, source, this.headerText(), architecture, ...options]
    const hash = createHash('sha256').update(parts.join('\0')).digest('hex').slice(0, 32)
    const path = join(this.folder, `${kernel.file.replace(/\.cu$/, '')}-${architecture}-${hash}`)
    return { path, source, options }
  }

  private compiler(): Nvrtc {
    return (this.nvrtc ??= loadNvrtc())
  }

  /** All headers beside the kernels: whoever includes one is compiled again when it changes. */
  private headerText(): string {
    return (this.headers ??= readdirSync(this.sources)
      .filter((file) => file.endsWith('.cuh'))
      .toSorted()
      .map((file) => readFileSync(join(this.sources, file), 'utf8'))
      .join('\0'))
  }

  /** Whole or not at all: another process may compile the same. */
  private keep(path: string, image: Uint8Array): void {
    const partial = `${path}.${randomUUID()}`
    try {
      mkdirSync(this.folder, { recursive: true })
      writeFileSync(partial, image)
      renameSync(partial, path)
    } catch (thrown) {
      // A disk that is full or read-only costs time at every start, but no answer.
      this.unkept = (thrown as Error).message
    }
  }
}

/** How many kernels are kept, and what they take. */
export function keptKernels(folder = cacheFolder()): {
  folder: string
  count: number
  bytes: number
} {
  const files = existsSync(folder) ? readdirSync(folder).filter((file) => /-sm_/.test(file)) : []
  const bytes = files.reduce((sum, file) => sum + statSync(join(folder, file)).size, 0)
  return { folder, count: files.length, bytes }
}

function cacheFolder(): string {
  const { LATTICE_KERNEL_CACHE: own, XDG_CACHE_HOME: cache } = process.env
  return own || join(cache || join(homedir(), '.cache'), 'lattice', 'kernels')
}

function readIfThere(path: string): Uint8Array | undefined {
  try {
    return readFileSync(path)
  } catch (thrown) {
    const { code } = thrown as NodeJS.ErrnoException
    if (code === 'ENOENT' || code === 'ENOTDIR') return undefined
    throw thrown
  }
}
