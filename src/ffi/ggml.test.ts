import assert from 'node:assert/strict'
import { readdirSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import koffi from 'koffi'
import {
  extraBufferTypes,
  FLAG_COMPUTE,
  librariesFolder,
  loadBase,
  loadVariant,
  TENSOR,
} from './ggml.ts'
import { mapAnonymous, unmap, viewMemory } from './libc.ts'
import { PARAMS } from '../backends/cpu/threads.ts'
import { TensorArena, TYPE_F16, TYPE_F32, TYPE_I32, TYPE_I64 } from '../backends/cpu/tensors.ts'

/** ggml's own object header before each tensor (ggml.c, `struct ggml_object`). */
const OBJECT_BYTES = 32

function struct(tensor: number): DataView {
  return new DataView(viewMemory(tensor, TENSOR.bytes))
}

function pointer(tensor: number, offset: number): number {
  return Number(struct(tensor).getBigUint64(offset, true))
}

/** Four 64-bit numbers. */
function four(tensor: number, offset: number): number[] {
  return [0, 1, 2, 3].map((d) => pointer(tensor, offset + 8 * d))
}

function withArena(run: (arena: TensorArena) => void): void {
  const arena = new TensorArena(1 << 20)
  try {
    run(arena)
  } finally {
    arena.free()
  }
}

test('a tensor struct of another size', () => {
  assert.equal(loadBase().ggml_tensor_overhead(), OBJECT_BYTES + TENSOR.bytes)
})

test('sizes, strides or the type read from the wrong place', () => {
  withArena((arena) => {
    const tensor = arena.create(TYPE_F16, [6, 5, 4, 3])
    assert.deepEqual(four(tensor, TENSOR.ne), [6, 5, 4, 3])
    assert.deepEqual(four(tensor, TENSOR.nb), [2, 12, 60, 240])
    assert.equal(struct(tensor).getInt32(TENSOR.type, true), TYPE_F16)
    const quantized = arena.createTyped('Q4_1', [64, 3])
    assert.deepEqual(four(quantized, TENSOR.nb).slice(0, 2), [20, 40])
  })
})

test('sizes and strides written to the wrong place', () => {
  withArena((arena) => {
    const { g } = arena
    const tensor = arena.create(TYPE_F32, [8, 4, 1, 1])
    assert.equal(g.ggml_nbytes(tensor), 8 * 4 * 4)
    arena.setSize(tensor, 1, 3)
    assert.equal(g.ggml_nbytes(tensor), 8 * 3 * 4)
    arena.setStride(tensor, 1, 5 * 2 ** 32)
    assert.equal(g.ggml_nbytes(tensor), 8 * 4 + 2 * 5 * 2 ** 32)
    arena.setShape(tensor, [2, 3, 5, 7], [4, 8, 24, 120])
    assert.equal(g.ggml_nbytes(tensor), 4 * 2 * 3 * 5 * 7)
  })
})

test("a node's operation, sources, view or data read from or written to the wrong place", () => {
  withArena((arena) => {
    const { g, context } = arena
    const [a, b] = [arena.create(TYPE_F32, [16, 2]), arena.create(TYPE_F32, [16, 2])]
    const sum = g.ggml_add(context, a, b)
    assert.equal(g.ggml_op_name(struct(sum).getInt32(TENSOR.op, true)), 'ADD')
    assert.deepEqual(
      [0, 8, 16].map((i) => pointer(sum, TENSOR.sources + i)),
      [a, b, 0],
    )
    arena.setSource(sum, 1, a)
    assert.equal(pointer(sum, TENSOR.sources + 8), a)

    const address = 0x7123_4567_89ab
    arena.setData(a, address)
    assert.equal(arena.data(a), address)
    // A view takes its source's data and adds an offset: ggml reads what was written.
    const view = g.ggml_view_3d(context, a, 4, 2, 1, 64, 128, 16)
    assert.equal(pointer(view, TENSOR.viewSource), a)
    assert.equal(arena.data(view), address + 16)
  })
})

test('a node that is told to rest and is computed, or the other way round', () => {
  withArena((arena) => {
    const { g, context } = arena
    const cpu = loadVariant('x64')
    const memory = mapAnonymous(4096)
    const values = new Float32Array(viewMemory(memory, 4096))
    const [a, b] = [arena.create(TYPE_F32, [4]), arena.create(TYPE_F32, [4])]
    arena.setData(a, memory)
    arena.setData(b, memory + 16)
    const sum = g.ggml_add(context, a, b)
    arena.setData(sum, memory + 32)
    const graph = g.ggml_new_graph_custom(context, 8, false)
    g.ggml_build_forward_expand(graph, sum)
    assert.equal(struct(sum).getInt32(TENSOR.flags, true) & FLAG_COMPUTE, FLAG_COMPUTE)
    values.set([1, 2, 3, 4, 10, 20, 30, 40])
    const handle = cpu.ggml_backend_cpu_init()
    cpu.ggml_backend_cpu_set_n_threads(handle, 1)
    const computed = (enabled: boolean) => {
      values.fill(0, 8, 12)
      arena.setEnabled(sum, enabled)
      assert.equal(g.ggml_backend_graph_compute(handle, graph), 0)
      return [...values.subarray(8, 12)]
    }
    assert.deepEqual(computed(false), [0, 0, 0, 0])
    assert.deepEqual(computed(true), [11, 22, 33, 44])
    g.ggml_backend_free(handle)
    unmap(memory, 4096)
  })
})

test("a buffer, or a repacked weight's mark, that lies elsewhere in the struct", () => {
  withArena((arena) => {
    const { g } = arena
    const { bufferTypes } = extraBufferTypes(loadVariant('haswell'))
    const repack = bufferTypes.find((type) => g.ggml_backend_buft_name(type) === 'CPU_REPACK')
    assert.ok(repack)
    const tensor = arena.createTyped('Q4_0', [32, 32])
    const buffer = g.ggml_backend_buft_alloc_buffer(repack, 1 << 16)
    const base = g.ggml_backend_buffer_get_base(buffer)
    assert.deepEqual(
      [TENSOR.buffer, TENSOR.extra].map((at) => pointer(tensor, at)),
      [0, 0],
    )
    assert.equal(g.ggml_backend_tensor_alloc(buffer, tensor, base), 0)
    assert.equal(pointer(tensor, TENSOR.buffer), buffer)
    assert.equal(arena.data(tensor), base)
    // A build for this processor marks what it will repack; others leave it alone.
    const score = loadVariant('haswell').ggml_backend_score()
    if (score > 0) assert.notEqual(pointer(tensor, TENSOR.extra), 0)
    arena.setBuffer(tensor, 0)
    assert.equal(pointer(tensor, TENSOR.buffer), 0)
    g.ggml_backend_buffer_free(buffer)
  })
})

test('an id that names another type', () => {
  const ids = [TYPE_F32, TYPE_F16, TYPE_I32, TYPE_I64]
  const names = ids.map((id) => loadBase().ggml_type_name(id))
  assert.deepEqual(names, ['f32', 'f16', 'i32', 'i64'])
})

test("a field of the thread pool's parameters in the wrong place", () => {
  const match = koffi
    .load(join(librariesFolder(), 'libggml-base.so'))
    .func('ggml_threadpool_params_match', 'bool', ['uintptr_t', 'uintptr_t'])
  const page = mapAnonymous(2 * PARAMS.bytes)
  const [ours, theirs] = [page, page + PARAMS.bytes]
  const view = new DataView(viewMemory(ours, PARAMS.bytes))
  const g = loadBase()
  g.ggml_threadpool_params_init(ours, 2)
  g.ggml_threadpool_params_init(theirs, 2)
  assert.equal(view.getInt32(PARAMS.threads, true), 2)
  // Each is a byte that the library compares, but the last (`paused`), and the struct ends there.
  const { cpumask, threads, priority, poll, strict, bytes } = PARAMS
  for (const byte of [cpumask, threads - 1, threads, priority, poll, strict]) {
    const value = view.getUint8(byte)
    assert.ok(match(ours, theirs), `equal before byte ${byte} changes`)
    view.setUint8(byte, value ^ 1)
    assert.ok(!match(ours, theirs), `different after byte ${byte} has changed`)
    view.setUint8(byte, value)
  }
  view.setUint8(strict + 1, 1)
  assert.ok(match(ours, theirs))
  assert.equal(bytes, strict + 4)
  unmap(page, 2 * PARAMS.bytes)
})

test('a build that lacks one of the functions, or takes another version of the base', () => {
  const builds = readdirSync(librariesFolder())
    .map((file) => /^libggml-cpu-(.+)\.so$/.exec(file)?.[1])
    .filter((name) => name !== undefined)
  assert.ok(builds.length > 5)
  for (const build of builds) {
    // Binding looks every function up; scoring is all that any processor may run.
    assert.equal(typeof loadVariant(build).ggml_backend_score(), 'number', build)
  }
  assert.match(loadBase().ggml_version(), /^\d+\.\d+\.\d+$/)
})
