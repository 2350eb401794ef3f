// Owns where NVIDIA's libraries lie: the driver where the loader looks, the compiler and the matrix
// library in a CUDA toolkit or in the `nvidia-*` wheels of a Python environment.

import { existsSync, globSync } from 'node:fs'
import { dirname, join } from 'node:path'
import koffi, { type LibraryHandle } from 'koffi'
import { LatticeError } from '../errors.ts'

export type CudaLibrary = 'driver' | 'nvrtc' | 'cublaslt'

interface Known {
  /** What a user calls it. */
  title: string
  /** File names, the best first. */
  files: readonly string[]
  /** How to get it. */
  todo: string
}

/** @param wheel that has it, too */
function waysTo(wheel: string): string {
  return (
    `Install a CUDA toolkit (12.4 or later), or in a Python environment on PATH \`pip install` +
    ` ${wheel}\` (with a driver before 580 ${wheel}-cu12); or name its folder in LATTICE_CUDA_PATH.`
  )
}

const KNOWN: Record<CudaLibrary, Known> = {
  driver: {
    title: "NVIDIA's GPU driver",
    files: ['libcuda.so.1'],
    todo:
      'Install the NVIDIA driver (550 or later), or give the container the GPU' +
      ' (`docker run --gpus all`); without a GPU use --device cpu.',
  },
  nvrtc: {
    title: 'the CUDA run-time compiler (NVRTC)',
    files: ['libnvrtc.so.13', 'libnvrtc.so.12'],
    todo: waysTo('nvidia-cuda-nvrtc'),
  },
  cublaslt: {
    title: "CUDA's matrix library (cuBLASLt)",
    files: ['libcublasLt.so.13', 'libcublasLt.so.12'],
    todo: waysTo('nvidia-cublas'),
  },
}

export interface LibrarySearch {
  library: CudaLibrary
  title: string
  /** Undefined if no folder has it; the system's loader may still know better. */
  path: string | undefined
  /** Folders looked in, in this order. */
  folders: string[]
  todo: string
}

type Environment = Readonly<Record<string, string | undefined>>

/** Where the driver's own installers put it; the loader's cache, asked last, knows the rest. */
const DRIVER_FOLDERS = [
  '/usr/lib/x86_64-linux-gnu',
  '/usr/lib/aarch64-linux-gnu',
  '/usr/lib64',
  '/usr/local/nvidia/lib64',
  '/usr/lib/wsl/lib',
  '/run/opengl-driver/lib',
]

export function findCudaLibrary(
  library: CudaLibrary,
  env: Environment = process.env,
): LibrarySearch {
  const { title, files, todo } = KNOWN[library]
  const folders = [...new Set([...named(env), ...usual(library, env)])]
  const path = files
    .flatMap((file) => folders.map((folder) => join(folder, file)))
    .find((candidate) => existsSync(candidate))
  return { library, title, path, folders, todo }
}

/** Folders with CUDA's headers, for kernels that include them; none if there are none. */
export function cudaIncludeFolders(env: Environment = process.env): string[] {
  const roots = [...named(env), ...toolkits(env), ...wheels(env)]
  const folders = roots.flatMap((root) => [join(root, 'include'), join(root, '..', 'include')])
  return [...new Set(folders)].filter((folder) => existsSync(join(folder, 'cuda_fp16.h')))
}

/**
 * Loads a library into this process.
 * @throws LatticeError `backend_unavailable`: what is missing, where it was looked for, what to do
 */
export function openCudaLibrary(library: CudaLibrary): { handle: LibraryHandle; path: string } {
  const found = findCudaLibrary(library)
  // The loader's own cache and LD_LIBRARY_PATH know places that no list has.
  const tries = found.path === undefined ? KNOWN[library].files : [found.path]
  let cause: unknown
  for (const path of tries) {
    try {
      return { handle: koffi.load(path), path }
    } catch (thrown) {
      cause = thrown
    }
  }
  const problem =
    found.path === undefined
      ? `was not found (looked for ${KNOWN[library].files.join(', ')})`
      : `cannot be loaded from ${found.path}`
  throw new LatticeError('backend_unavailable', `${capital(found.title)} ${problem}.`, {
    todo: found.todo,
    details: { library, looked_in: found.folders.join(':') },
    cause,
  })
}

function capital(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1)
}

/** What the user named comes first, with or without the `lib` at its end. */
function named(env: Environment): string[] {
  return list(env['LATTICE_CUDA_PATH']).flatMap((folder) => [
    folder,
    join(folder, 'lib64'),
    join(folder, 'lib'),
  ])
}

function usual(library: CudaLibrary, env: Environment): string[] {
  const loader = list(env['LD_LIBRARY_PATH'])
  if (library === 'driver') return [...loader, ...DRIVER_FOLDERS]
  return [...loader, ...toolkits(env), ...wheels(env), ...DRIVER_FOLDERS]
}

function toolkits(env: Environment): string[] {
  const roots = [env['CUDA_HOME'], env['CUDA_PATH'], '/usr/local/cuda', '/opt/cuda']
    .filter((root) => root !== undefined && root !== '')
    .map((root) => root as string)
  // Highest version first: cuda-13.0 before cuda-12.8.
  const versions = globSync('/usr/local/cuda-*').toSorted((a, b) => version(b) - version(a))
  return [...roots, ...versions].map((root) => join(root, 'lib64'))
}

function version(path: string): number {
  return Number(/cuda-(\d+(?:\.\d+)?)$/.exec(path)?.[1] ?? 0)
}

/** The library folders of every Python environment that is active, on PATH or the system's. */
function wheels(env: Environment): string[] {
  const roots = [
    env['VIRTUAL_ENV'],
    env['CONDA_PREFIX'],
    ...list(env['PATH'])
      .filter((folder) => existsSync(join(folder, 'python3')))
      .map((folder) => dirname(folder)),
    ...(env['HOME'] === undefined ? [] : [join(env['HOME'], '.local')]),
    '/usr/local',
    '/usr',
  ]
  return roots
    .filter((root) => root !== undefined && root !== '')
    .flatMap((root) =>
      globSync(`lib/python3*/{site,dist}-packages/nvidia/*/lib`, { cwd: root as string }).map(
        (folder) => join(root as string, folder),
      ),
    )
}

function list(paths: string | undefined): string[] {
  return (paths ?? '').split(':').filter((path) => path !== '')
}
