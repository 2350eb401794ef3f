// Owns where tests take CUDA's compiler from: a toolkit or wheel that is there, else the wheel,
// installed once into a folder of its own. Compiling needs no GPU.

import { execFile } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { existsSync, mkdirSync, renameSync, rmSync } from 'node:fs'
import { homedir } from 'node:os'
import { dirname, join } from 'node:path'
import { promisify } from 'node:util'
import { findCudaLibrary } from '../../src/ffi/cuda-libraries.ts'

/** The first version that knows all architectures that kernels are compiled for. */
const WHEEL = 'nvidia-cuda-nvrtc>=13.0,<14'
const LIBRARIES = 'nvidia/cu13'

/**
 * Sees to it that the compiler can be loaded in this process.
 * @returns why it cannot; undefined if it can
 */
export async function provideNvrtc(): Promise<string | undefined> {
  if (findCudaLibrary('nvrtc').path !== undefined) return undefined
  const cache = process.env['XDG_CACHE_HOME'] || join(homedir(), '.cache')
  const folder = join(cache, 'lattice', 'nvrtc-13')
  if (!existsSync(folder)) {
    const failure = await install(folder)
    if (failure !== undefined) return failure
  }
  process.env['LATTICE_CUDA_PATH'] = join(folder, LIBRARIES)
  return findCudaLibrary('nvrtc').path === undefined ? `${folder} holds no compiler` : undefined
}

/** Whole or not at all, so that test files that start together do not disturb each other. */
async function install(folder: string): Promise<string | undefined> {
  const partial = `${folder}.${randomUUID()}`
  mkdirSync(dirname(folder), { recursive: true })
  const pip = ['-m', 'pip', 'install', '--quiet', '--no-deps', '--target', partial, WHEEL]
  try {
    await promisify(execFile)('python3', pip, { timeout: 120_000 })
  } catch (thrown) {
    rmSync(partial, { recursive: true, force: true })
    return `no CUDA compiler, and pip cannot install ${WHEEL}: ${String(thrown).slice(0, 300)}`
  }
  try {
    renameSync(partial, folder)
  } catch (thrown) {
    rmSync(partial, { recursive: true, force: true })
    if (!existsSync(folder)) return String(thrown)
  }
  return undefined
}
