// Catches a library that lies in a usual place and is not found, or another than the user named.

import assert from 'node:assert/strict'
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { after, test } from 'node:test'
import { cudaIncludeFolders, findCudaLibrary } from './cuda-libraries.ts'

const root = mkdtempSync(join(tmpdir(), 'lattice-libraries-'))
after(() => rmSync(root, { recursive: true }))

function file(path: string): string {
  const whole = join(root, path)
  mkdirSync(dirname(whole), { recursive: true })
  writeFileSync(whole, '')
  return whole
}

const toolkit = file('toolkit/lib64/libnvrtc.so.13')
const wheel = file('venv/lib/python3.12/site-packages/nvidia/cu13/lib/libcublasLt.so.13')
const own = file('own/libnvrtc.so.12')
file('venv/bin/python3')
file('toolkit/include/cuda_fp16.h')

test('a CUDA toolkit is not found by CUDA_HOME', () => {
  const env = { CUDA_HOME: join(root, 'toolkit') }
  assert.equal(findCudaLibrary('nvrtc', env).path, toolkit)
  assert.ok(cudaIncludeFolders(env).includes(join(root, 'toolkit', 'include')))
})

test('the wheels of the Python on PATH, or of the active environment, are not found', () => {
  assert.equal(findCudaLibrary('cublaslt', { PATH: join(root, 'venv/bin') }).path, wheel)
  assert.equal(findCudaLibrary('cublaslt', { VIRTUAL_ENV: join(root, 'venv') }).path, wheel)
})

test('another library is taken than the one that LATTICE_CUDA_PATH names', () => {
  const CUDA_HOME = join(root, 'nowhere')
  const env = { CUDA_HOME, LATTICE_CUDA_PATH: `${join(root, 'empty')}:${join(root, 'own')}` }
  assert.equal(findCudaLibrary('nvrtc', env).path, own)
  assert.equal(findCudaLibrary('nvrtc', env).folders[0], join(root, 'empty'))
})

test('what is missing has no list of places, or nothing to do about it', () => {
  const { path, folders, todo } = findCudaLibrary('nvrtc', { CUDA_HOME: join(root, 'nowhere') })
  if (path !== undefined) return // A toolkit of the system's own.
  assert.ok(folders.includes(join(root, 'nowhere', 'lib64')))
  assert.match(todo, /LATTICE_CUDA_PATH/)
})
