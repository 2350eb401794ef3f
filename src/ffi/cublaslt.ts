// Owns calls into cuBLASLt, CUDA's matrix library: descriptions of a product, the algorithms it
// knows for it, and the product itself.
//
// All matrices are column-major, as BLAS has them: a row-major [rows, columns] array is a
// column-major matrix of `columns` rows. D = alpha · op(A) · op(B) + beta · C.

import { LatticeError } from '../errors.ts'
import { NativeBlock } from './block.ts'
import { openCudaLibrary } from './cuda-libraries.ts'

/** cudaDataType. */
export const MATRIX = { f32: 0, f16: 2, bf16: 14, e4m3: 28 } as const
/** cublasComputeType_t: float32 accumulation, or with inputs rounded to tf32. */
export const COMPUTE = { f32: 68, fastTf32: 77 } as const
/** cublasLtEpilogue_t. */
export const EPILOGUE = { none: 1, relu: 2, bias: 4 } as const

/** Bytes of an algorithm as cuBLASLt describes it: opaque, valid for one version on one GPU. */
export const ALGORITHM_BYTES = 64

export interface MatrixLayout {
  type: number
  rows: number
  columns: number
  /** Elements from a column to the next. */
  leading: number
  /** Matrices that are multiplied alike, `batchStride` elements apart. */
  batch?: number
  batchStride?: number
}

export interface MatmulOptions {
  compute?: number
  /** cudaDataType of alpha and beta. */
  scale?: number
  transposeA?: boolean
  transposeB?: boolean
  epilogue?: number
  /** Device address of the bias vector, for EPILOGUE.bias. */
  biasAddress?: number
  /** Whether sums of 8-bit products may stay in the tensor cores, with fewer bits. */
  fastSums?: boolean
}

/** One product's description; its parts are cuBLASLt's handles. */
export interface MatmulPlan {
  readonly descriptor: number
  readonly a: number
  readonly b: number
  readonly d: number
}

export interface MatmulAlgorithm {
  /** Keeps its address: `address` is what `matmul` takes. */
  block: NativeBlock
  address: number
  workspaceBytes: number
  /** Fraction of the last wave of blocks that is used, as the library estimates. */
  waves: number
}

export interface CublasLt {
  readonly path: string
  /** Such as 130000. */
  readonly version: number
  /** Needs a current context; one a thread. */
  createHandle(): number
  destroyHandle(handle: number): void
  plan(a: MatrixLayout, b: MatrixLayout, d: MatrixLayout, options?: MatmulOptions): MatmulPlan
  destroyPlan(plan: MatmulPlan): void
  /** Up to `count` algorithms that need no more workspace than this, the likely best first. */
  algorithms(
    handle: number,
    plan: MatmulPlan,
    workspaceBytes: number,
    count: number,
  ): MatmulAlgorithm[]
  /** An algorithm that was found and kept earlier. */
  algorithm(bytes: Uint8Array, workspaceBytes: number): MatmulAlgorithm
  /**
   * Queues D = op(A) op(B), or D += with `accumulate`. Addresses are the device's; `workspace`
   * must hold the algorithm's workspaceBytes and serve one product at a time.
   */
  matmul(
    handle: number,
    plan: MatmulPlan,
    algorithm: MatmulAlgorithm,
    a: number,
    b: number,
    d: number,
    workspace: number,
    stream: number,
    accumulate?: boolean,
  ): void
}

const ptr = 'uintptr_t'

/** All return cublasStatus_t. */
const CALLS = {
  cublasLtCreate: [ptr],
  cublasLtDestroy: [ptr],
  cublasLtMatmulDescCreate: [ptr, 'int', 'int'],
  cublasLtMatmulDescDestroy: [ptr],
  cublasLtMatmulDescSetAttribute: [ptr, 'int', ptr, 'size_t'],
  cublasLtMatrixLayoutCreate: [ptr, 'int', 'uint64_t', 'uint64_t', 'int64_t'],
  cublasLtMatrixLayoutDestroy: [ptr],
  cublasLtMatrixLayoutSetAttribute: [ptr, 'int', ptr, 'size_t'],
  cublasLtMatmulPreferenceCreate: [ptr],
  cublasLtMatmulPreferenceDestroy: [ptr],
  cublasLtMatmulPreferenceSetAttribute: [ptr, 'int', ptr, 'size_t'],
  cublasLtMatmulAlgoGetHeuristic: [ptr, ptr, ptr, ptr, ptr, ptr, ptr, 'int', ptr, ptr],
  cublasLtMatmul: [
    ...[ptr, ptr, ptr, ptr, ptr, ptr, ptr, ptr],
    ...[ptr, ptr, ptr, ptr, ptr, ptr, 'size_t', ptr],
  ],
} as const satisfies Record<string, readonly string[]>

type Calls = Readonly<Record<keyof typeof CALLS, (...args: readonly number[]) => number>>

/** cublasLtMatmulDescAttributes_t, …LayoutAttribute_t and …PreferenceAttributes_t. */
const DESCRIPTOR = { transposeA: 3, transposeB: 4, epilogue: 7, biasAddress: 8, fastSums: 25 }
const LAYOUT = { batch: 5, batchStride: 6 }
const PREFERENCE = { workspaceBytes: 1 }
const TRANSPOSE = 1

/** cublasLtMatmulHeuristicResult_t: algorithm, workspace, state, waves, reserved. */
const RESULT = { bytes: 96, workspace: 64, state: 72, waves: 76 }
const RESULTS_MAX = 64

/** @throws LatticeError `backend_unavailable` saying what is missing */
export function loadCublasLt(): CublasLt {
  const { handle: library, path } = openCudaLibrary('cublaslt')
  const calls = Object.fromEntries(
    Object.entries(CALLS).map(([name, types]) => [name, library.func(name, 'int', [...types])]),
  ) as unknown as Calls
  const nameOf = library.func('cublasLtGetStatusName', 'str', ['int'])
  const version = Number(library.func('cublasLtGetVersion', 'size_t', [])())
  const out = new NativeBlock(16)
  const results = new NativeBlock(RESULTS_MAX * RESULT.bytes)
  /** Zero and one as float32: alpha and beta are read when a product is queued. */
  const scalars = new NativeBlock(8)
  scalars.f32[1] = 1
  // Functions, because they keep the memory alive: an address alone does not.
  const zero = (): number => scalars.address
  const one = (): number => scalars.address + 4

  const check = (result: number, call: string): void => {
    if (result === 0) return
    const code = String(nameOf(result))
    throw new LatticeError('gpu_call_failed', `${call} failed with ${code}.`, {
      todo: `The library is ${path}: \`lattice inspect gpu\` shows what else was found.`,
      details: { call, code },
    })
  }

  const created = (result: number, call: string): number => {
    check(result, call)
    return out.number(0)
  }

  const set = (
    call:
      | 'cublasLtMatmulDescSetAttribute'
      | 'cublasLtMatrixLayoutSetAttribute'
      | 'cublasLtMatmulPreferenceSetAttribute',
    object: number,
    attribute: number,
    value: number,
    bytes: 1 | 4 | 8,
  ): void => {
    out.setNumber(0, value)
    check(calls[call](object, attribute, out.address, bytes), call)
  }

  const layout = ({ type, rows, columns, leading, batch, batchStride }: MatrixLayout): number => {
    const made = created(
      calls.cublasLtMatrixLayoutCreate(out.address, type, rows, columns, leading),
      'cublasLtMatrixLayoutCreate',
    )
    if (batch !== undefined) {
      set('cublasLtMatrixLayoutSetAttribute', made, LAYOUT.batch, batch, 4)
      set('cublasLtMatrixLayoutSetAttribute', made, LAYOUT.batchStride, batchStride ?? 0, 8)
    }
    return made
  }

  const descriptorFor = (options: MatmulOptions): number => {
    const { compute = COMPUTE.f32, scale = MATRIX.f32 } = options
    const made = created(
      calls.cublasLtMatmulDescCreate(out.address, compute, scale),
      'cublasLtMatmulDescCreate',
    )
    const call = 'cublasLtMatmulDescSetAttribute'
    if (options.transposeA) set(call, made, DESCRIPTOR.transposeA, TRANSPOSE, 4)
    if (options.transposeB) set(call, made, DESCRIPTOR.transposeB, TRANSPOSE, 4)
    if (options.epilogue !== undefined) set(call, made, DESCRIPTOR.epilogue, options.epilogue, 4)
    if (options.biasAddress) set(call, made, DESCRIPTOR.biasAddress, options.biasAddress, 8)
    if (options.fastSums) set(call, made, DESCRIPTOR.fastSums, 1, 1)
    return made
  }

  const algorithm = (bytes: Uint8Array, workspaceBytes: number, waves = 0): MatmulAlgorithm => {
    const block = new NativeBlock(ALGORITHM_BYTES)
    block.bytes.set(bytes.subarray(0, ALGORITHM_BYTES))
    return { block, address: block.address, workspaceBytes, waves }
  }

  return {
    path,
    version,
    createHandle() {
      return created(calls.cublasLtCreate(out.address), 'cublasLtCreate')
    },
    destroyHandle(handle) {
      check(calls.cublasLtDestroy(handle), 'cublasLtDestroy')
    },
    plan(a, b, d, options = {}) {
      return { descriptor: descriptorFor(options), a: layout(a), b: layout(b), d: layout(d) }
    },
    destroyPlan({ descriptor, a, b, d }) {
      for (const made of [a, b, d]) {
        check(calls.cublasLtMatrixLayoutDestroy(made), 'cublasLtMatrixLayoutDestroy')
      }
      check(calls.cublasLtMatmulDescDestroy(descriptor), 'cublasLtMatmulDescDestroy')
    },
    algorithms(handle, { descriptor, a, b, d }, workspaceBytes, count) {
      const preference = created(
        calls.cublasLtMatmulPreferenceCreate(out.address),
        'cublasLtMatmulPreferenceCreate',
      )
      const call = 'cublasLtMatmulPreferenceSetAttribute'
      set(call, preference, PREFERENCE.workspaceBytes, workspaceBytes, 8)
      const result = calls.cublasLtMatmulAlgoGetHeuristic(
        ...[handle, descriptor, a, b, d, d, preference],
        ...[Math.min(count, RESULTS_MAX), results.address, out.address],
      )
      const found = out.i32[0] ?? 0
      calls.cublasLtMatmulPreferenceDestroy(preference)
      check(result, 'cublasLtMatmulAlgoGetHeuristic')
      return Array.from({ length: found }, (_, i) => i * RESULT.bytes)
        .filter((at) => results.i32[(at + RESULT.state) / 4] === 0)
        .map((at) => {
          const bytes = results.bytes.subarray(at, at + ALGORITHM_BYTES)
          const waves = results.f32[(at + RESULT.waves) / 4] ?? 0
          return algorithm(bytes, results.number(at + RESULT.workspace), waves)
        })
    },
    algorithm,
    matmul(handle, plan, chosen, a, b, d, workspace, stream, accumulate = false) {
      const result = calls.cublasLtMatmul(
        handle,
        plan.descriptor,
        one(),
        a,
        plan.a,
        b,
        plan.b,
        accumulate ? one() : zero(),
        d,
        plan.d,
        d,
        plan.d,
        chosen.address,
        workspace,
        chosen.workspaceBytes,
        stream,
      )
      if (result !== 0) check(result, 'cublasLtMatmul')
    },
  }
}
