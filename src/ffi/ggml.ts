// Owns the binding to ggml, the CPU compute library: which functions exist, their C types, and
// where the fields of a tensor lie. Nothing here decides anything.
//
// Tensors are addresses (numbers). Fields that change between steps are written straight into the
// tensor, so re-running a graph costs no calls: see `TENSOR`. A test checks every offset.

import { findPackageJSON } from 'node:module'
import { dirname, join } from 'node:path'
import koffi, { type LibraryHandle } from 'koffi'
import { present } from '../assert.ts'
import { LatticeError } from '../errors.ts'

/** Byte offsets in `struct ggml_tensor` (ggml.h of the pinned package version). */
export const TENSOR = {
  bytes: 336,
  type: 0,
  buffer: 8,
  ne: 16,
  nb: 48,
  op: 80,
  flags: 148,
  sources: 152,
  viewSource: 232,
  data: 248,
  extra: 320,
} as const

/** Set on nodes that a graph computes; a node without it is skipped, barrier and all. */
export const FLAG_COMPUTE = 16

export const ROPE_INTERLEAVED = 0
export const ROPE_HALVES = 2

const ptr = 'uintptr_t'

/** Functions of libggml-base.so, by name: result, then arguments. */
const BASE = {
  ggml_free: ['void', ptr],
  ggml_new_tensor: [ptr, ptr, 'int', 'int', 'int64_t *'],
  ggml_view_3d: [ptr, ptr, ptr, 'int64_t', 'int64_t', 'int64_t', 'size_t', 'size_t', 'size_t'],
  ggml_get_rows: [ptr, ptr, ptr, ptr],
  ggml_set_rows: [ptr, ptr, ptr, ptr, ptr],
  ggml_mul_mat: [ptr, ptr, ptr, ptr],
  ggml_add: [ptr, ptr, ptr, ptr],
  ggml_mul: [ptr, ptr, ptr, ptr],
  ggml_scale: [ptr, ptr, ptr, 'float'],
  ggml_rms_norm: [ptr, ptr, ptr, 'float'],
  ggml_swiglu: [ptr, ptr, ptr],
  ggml_swiglu_split: [ptr, ptr, ptr, ptr],
  ggml_geglu: [ptr, ptr, ptr],
  ggml_geglu_split: [ptr, ptr, ptr, ptr],
  ggml_rope_ext_inplace: [
    ptr,
    ...[ptr, ptr, ptr, ptr, 'int', 'int', 'int'],
    ...['float', 'float', 'float', 'float', 'float', 'float'],
  ],
  ggml_flash_attn_ext: [ptr, ptr, ptr, ptr, ptr, ptr, 'float', 'float', 'float'],
  ggml_new_graph_custom: [ptr, ptr, 'size_t', 'bool'],
  ggml_build_forward_expand: ['void', ptr, ptr],
  ggml_tensor_overhead: ['size_t'],
  ggml_nbytes: ['size_t', ptr],
  ggml_type_size: ['size_t', 'int'],
  ggml_blck_size: ['int64_t', 'int'],
  ggml_type_name: ['str', 'int'],
  ggml_op_name: ['str', 'int'],
  ggml_version: ['str'],
  ggml_threadpool_params_init: ['void', ptr, 'int'],
  ggml_backend_free: ['void', ptr],
  ggml_backend_graph_compute: ['int', ptr, ptr],
  ggml_backend_buft_name: ['str', ptr],
  ggml_backend_buft_alloc_buffer: [ptr, ptr, 'size_t'],
  ggml_backend_buft_get_alloc_size: ['size_t', ptr, ptr],
  ggml_backend_buft_get_alignment: ['size_t', ptr],
  ggml_backend_buffer_get_base: [ptr, ptr],
  ggml_backend_buffer_free: ['void', ptr],
  ggml_backend_tensor_alloc: ['int', ptr, ptr, ptr],
  ggml_backend_tensor_set: ['void', ptr, ptr, 'size_t', 'size_t'],
  ggml_backend_dev_supports_op: ['bool', ptr, ptr],
  ggml_backend_reg_dev_get: [ptr, ptr, 'size_t'],
  ggml_backend_reg_get_proc_address: ['void *', ptr, 'str'],
} as const satisfies Signatures

/** Functions of libggml-cpu-VARIANT.so. */
const CPU = {
  ggml_backend_score: ['int'],
  ggml_backend_cpu_init: [ptr],
  ggml_backend_cpu_reg: [ptr],
  ggml_backend_cpu_set_n_threads: ['void', ptr, 'int'],
  ggml_backend_cpu_set_threadpool: ['void', ptr, ptr],
  ggml_threadpool_new: [ptr, ptr],
  ggml_threadpool_free: ['void', ptr],
} as const satisfies Signatures

type Signatures = Record<string, readonly [result: string, ...args: string[]]>
// koffi's functions are untyped at heart; numbers go in, a number or a string comes out.
type Functions<S extends Signatures> = {
  readonly [K in keyof S]: (
    ...args: readonly unknown[]
  ) => S[K][0] extends 'str'
    ? string
    : S[K][0] extends 'void'
      ? void
      : S[K][0] extends 'bool'
        ? boolean
        : number
}

export type GgmlBase = Functions<typeof BASE> & {
  /** A context whose tensors live in `memory` (no data is allocated with them). */
  ggml_init(memBytes: number, memory: number): number
}
export type GgmlCpu = Functions<typeof CPU> & { readonly name: string }

function bind<S extends Signatures>(library: LibraryHandle, signatures: S): Functions<S> {
  const functions: Record<string, unknown> = {}
  for (const [name, [result, ...args]] of Object.entries(signatures)) {
    functions[name] = library.func(name, result, args)
  }
  return functions as Functions<S>
}

/** The folder of the shared libraries inside the pinned npm package. */
export function librariesFolder(): string {
  let manifest: string | undefined
  try {
    manifest = findPackageJSON('@node-llama-cpp/linux-x64', import.meta.url)
  } catch (cause) {
    throw new LatticeError('backend_unavailable', 'The CPU compute libraries are not installed.', {
      todo: 'Run `npm ci`; the package @node-llama-cpp/linux-x64 carries them.',
      cause,
    })
  }
  return join(dirname(present(manifest, 'manifest')), 'bins', 'linux-x64')
}

let base: GgmlBase | undefined

/** The library of tensor and graph functions; loaded once a process and thread. */
export function loadBase(): GgmlBase {
  if (base) return base
  // Global, because the variants look its symbols up.
  const library = koffi.load(join(librariesFolder(), 'libggml-base.so'), { global: true })
  // ggml's log holds nothing that a user can act on, and failures come back as statuses: its sink
  // is a C function that ignores its arguments (a callback into JavaScript could not be called
  // from ggml's own threads).
  const ignore = koffi.load('libc.so.6').symbol('getppid', 'void')
  library.func('ggml_log_set', 'void', ['void *', 'void *'])(ignore, null)
  const params = koffi.struct({ mem_size: 'size_t', mem_buffer: ptr, no_alloc: 'bool' })
  const init = library.func('ggml_init', ptr, [params])
  base = Object.assign(bind(library, BASE), {
    ggml_init: (memBytes: number, memory: number): number =>
      init({ mem_size: memBytes, mem_buffer: memory, no_alloc: true }),
  })
  return base
}

/** One micro-architecture's compute library, e.g. `sapphirerapids`. */
export function loadVariant(name: string): GgmlCpu {
  loadBase()
  const library = koffi.load(join(librariesFolder(), `libggml-cpu-${name}.so`))
  return Object.assign(bind(library, CPU), { name })
}

/** Buffer types beyond plain memory that this CPU offers (AMX tiles, repacked rows), best first. */
export function extraBufferTypes(cpu: GgmlCpu): { device: number; bufferTypes: number[] } {
  const g = loadBase()
  const registry = cpu.ggml_backend_cpu_reg()
  const device = g.ggml_backend_reg_dev_get(registry, 0)
  const address: unknown = g.ggml_backend_reg_get_proc_address(
    registry,
    'ggml_backend_dev_get_extra_bufts',
  )
  if (address === null) return { device, bufferTypes: [] }
  const list = koffi.call(address, EXTRA_BUFFER_TYPES, device) as unknown
  const bufferTypes: number[] = []
  for (let i = 0; list !== null; i++) {
    const bufferType = Number(koffi.decode(list, i * 8, ptr))
    if (bufferType === 0) break
    bufferTypes.push(bufferType)
  }
  return { device, bufferTypes }
}

const EXTRA_BUFFER_TYPES = koffi.proto(`void *ggml_extra_buffer_types(uintptr_t device)`)
