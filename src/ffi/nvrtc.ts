// Owns calls into NVIDIA's run-time compiler: CUDA C++ goes in, machine code for one architecture
// comes out. It needs no GPU.

import { globSync } from 'node:fs'
import { dirname, join } from 'node:path'
import koffi from 'koffi'
import { LatticeError } from '../errors.ts'
import { addressOf, cString, NativeBlock } from './block.ts'
import { openCudaLibrary } from './cuda-libraries.ts'

export interface CompileRequest {
  /** Names the program in messages. */
  name: string
  source: string
  /** Such as `sm_90a`: what follows --gpu-architecture. */
  architecture: string
  /** More options, one a string: `--std=c++17`, `-DHEAD_DIM=128`. */
  options?: readonly string[]
  /** Folders of headers, searched in this order. */
  includeFolders?: readonly string[]
}

export interface Compiled {
  /** A cubin, ready to be loaded. */
  image: Uint8Array<ArrayBuffer>
  /** Warnings, and what `--resource-usage` and the like asked for. */
  log: string
}

export interface Nvrtc {
  readonly path: string
  /** Such as "13.0". */
  readonly version: string
  /** Architectures that it compiles for: 80, 90, 100 … */
  architectures(): number[]
  /** @throws LatticeError `kernel_compile_failed` with the compiler's log */
  compile(request: CompileRequest): Compiled
}

const ptr = 'uintptr_t'

/** All return nvrtcResult. */
const CALLS = {
  nvrtcVersion: [ptr, ptr],
  nvrtcGetNumSupportedArchs: [ptr],
  nvrtcGetSupportedArchs: [ptr],
  nvrtcCreateProgram: [ptr, ptr, ptr, 'int', ptr, ptr],
  nvrtcDestroyProgram: [ptr],
  nvrtcCompileProgram: [ptr, 'int', ptr],
  nvrtcGetProgramLogSize: [ptr, ptr],
  nvrtcGetProgramLog: [ptr, ptr],
  nvrtcGetCUBINSize: [ptr, ptr],
  nvrtcGetCUBIN: [ptr, ptr],
} as const satisfies Record<string, readonly string[]>

type Calls = Readonly<Record<keyof typeof CALLS, (...args: readonly number[]) => number>>

const COMPILATION_FAILED = 6

/** @throws LatticeError `backend_unavailable` saying what is missing */
export function loadNvrtc(): Nvrtc {
  const { handle, path } = openCudaLibrary('nvrtc')
  // The compiler opens this one by its bare name; a wheel's folder is not on the loader's path.
  for (const builtins of globSync(join(dirname(path), 'libnvrtc-builtins.so.1*'))) {
    koffi.load(builtins)
  }
  const calls = Object.fromEntries(
    Object.entries(CALLS).map(([name, types]) => [name, handle.func(name, 'int', [...types])]),
  ) as unknown as Calls
  const nameOf = handle.func('nvrtcGetErrorString', 'str', ['int'])
  const out = new NativeBlock(16)

  const check = (result: number, call: string): void => {
    if (result === 0) return
    const code = String(nameOf(result))
    throw new LatticeError('gpu_call_failed', `${call} failed with ${code}.`, {
      todo: `The compiler is ${path}: \`lattice inspect gpu\` shows what else was found.`,
      details: { call, code },
    })
  }

  const logOf = (program: number): string => {
    check(calls.nvrtcGetProgramLogSize(program, out.address), 'nvrtcGetProgramLogSize')
    const log = new Uint8Array(out.number(0))
    check(calls.nvrtcGetProgramLog(program, addressOf(log)), 'nvrtcGetProgramLog')
    return Buffer.from(log).toString('utf8').replace(/\0.*/s, '').trim()
  }

  const build = (program: number, request: CompileRequest): Compiled => {
    const options = [
      `--gpu-architecture=${request.architecture}`,
      ...(request.options ?? []),
      ...(request.includeFolders ?? []).map((folder) => `--include-path=${folder}`),
    ].map(cString)
    const pointers = new NativeBlock(options.length * 8)
    options.forEach((option, i) => pointers.setNumber(i * 8, option.address))
    const result = calls.nvrtcCompileProgram(program, options.length, pointers.address)
    if (result === COMPILATION_FAILED) {
      const { name, architecture } = request
      throw new LatticeError(
        'kernel_compile_failed',
        `${name} does not compile for ${architecture}:\n${logOf(program)}`,
        {
          todo: `A toolkit of another version may help; this one is ${path}.`,
          details: { kernel: name, architecture },
        },
      )
    }
    check(result, 'nvrtcCompileProgram')
    check(calls.nvrtcGetCUBINSize(program, out.address), 'nvrtcGetCUBINSize')
    const image = new Uint8Array(out.number(0))
    check(calls.nvrtcGetCUBIN(program, addressOf(image)), 'nvrtcGetCUBIN')
    return { image, log: logOf(program) }
  }

  check(calls.nvrtcVersion(out.address, out.address + 4), 'nvrtcVersion')
  return {
    path,
    version: `${out.i32[0]}.${out.i32[1]}`,
    architectures() {
      check(calls.nvrtcGetNumSupportedArchs(out.address), 'nvrtcGetNumSupportedArchs')
      const list = new Int32Array(out.i32[0] ?? 0)
      check(calls.nvrtcGetSupportedArchs(addressOf(list)), 'nvrtcGetSupportedArchs')
      return [...list]
    },
    compile(request) {
      const source = cString(request.source)
      const name = cString(request.name)
      const result = calls.nvrtcCreateProgram(
        ...[out.address, source.address, name.address, 0, 0, 0],
      )
      check(result, 'nvrtcCreateProgram')
      const program = out.number(0)
      try {
        return build(program, request)
      } finally {
        out.setNumber(0, program)
        calls.nvrtcDestroyProgram(out.address)
      }
    },
  }
}
