// Catches a driver call whose arguments are in the wrong place or of the wrong width, a failure
// that is not told, a launch that costs more than a call: against a driver of a few lines of C.

import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, test } from 'node:test'
import { LatticeError } from '../errors.ts'
import { NativeBlock } from './block.ts'
import type { CudaDriver } from './cuda.ts'
import { KernelLaunch } from './kernel-launch.ts'
import { viewMemory } from './libc.ts'

/** Every call notes its arguments at a known place and returns `fail_with`. */
const DRIVER = String.raw`
#include <stdint.h>
#include <string.h>
typedef uint64_t u64;
static u64 seen[16]; static int fail_with; static u64 next = 0x7f0000001000;
static u64 *where(void) { return seen; }
#define NOTE(...) do { u64 a_[] = {__VA_ARGS__}; memcpy(seen, a_, sizeof a_); } while (0)
int cuGetErrorName(int code, const char **name) {
  *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OTHER";
  return code == 12345;
}
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(u64 *v) { *(int *)v = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *s, int n, int d) { strcpy(s, "Tin GPU"); return 0; }
int cuDeviceGetUuid_v2(char *u, int d) { for (int i = 0; i < 16; i++) u[i] = i; return 0; }
int cuDeviceTotalMem_v2(u64 *b, int d) { *b = 80ull << 30; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 9 : a == 76 ? 0 : a; return 0; }
int cuDevicePrimaryCtxRetain(u64 *c, int d) { *c = (u64)where(); return 0; }
int cuMemGetInfo_v2(u64 *a, u64 *b) { *a = 5ull << 33; *b = 80ull << 30; return fail_with; }
int cuMemAlloc_v2(u64 *a, u64 n) { *a = next; NOTE(n); return n >> 40 ? 2 : 0; }
int cuMemCreate(u64 *h, u64 n, const int *p, u64 f) {
  NOTE(n, p[0], p[1], p[2], p[3], f); *h = 77; return fail_with;
}
int cuMemMap(u64 a, u64 n, u64 o, u64 h, u64 f) { NOTE(a, n, o, h, f); return fail_with; }
int cuMemSetAccess(u64 a, u64 n, const int *d, u64 c) {
  NOTE(a, n, d[0], d[1], d[2], c); return fail_with;
}
int cuGraphGetNodes(u64 g, u64 *nodes, u64 *n) {
  if (nodes) for (u64 i = 0; i < *n; i++) nodes[i] = 0x7f0000000000 + i + g;
  else *n = 40;
  return fail_with;
}
/* Of graph 1 the last of 40 nodes fills memory. */
int cuGraphNodeGetType(u64 node, int *t) { *t = node == 0x7f0000000028 ? 2 : 0; return 0; }
int cuEventQuery(u64 e) { return e == 1 ? 600 : 0; }
int cuMemsetD16Async(u64 a, unsigned short v, u64 n, u64 s) { NOTE(a, v, n, s); return 0; }
struct attribute { unsigned id, pad; unsigned value[16]; };
struct config {
  unsigned grid[3], block[3], shared; u64 stream; struct attribute *attrs; unsigned count;
};
int cuLaunchKernelEx(const struct config *c, u64 f, void **p, void **x) {
  NOTE(f, c->grid[0], c->grid[2], c->block[0], c->shared, c->stream, c->count,
       c->count ? c->attrs[0].id : 0, c->count ? c->attrs[0].value[0] : 0,
       *(u64 *)p[0], (u64)*(int *)p[1], *(unsigned *)p[2], (u64)p[3] % 64, (u64)x);
  return fail_with;
}
int cuTensorMapEncodeTiled(void *m, int t, unsigned r, void *g, const u64 *dims, const u64 *strides,
    const unsigned *box, const unsigned *es, int i, int sw, int l2, int oob) {
  NOTE(t, r, (u64)g, dims[0], dims[2], strides[0], strides[1], box[0], box[2], es[2], sw, l2);
  return 0;
}
`

/** What is not written out above is there, and succeeds. */
const OTHERS = `cuDevicePrimaryCtxRelease_v2 cuCtxSetCurrent cuCtxSynchronize
  cuStreamCreateWithPriority cuStreamDestroy_v2 cuStreamSynchronize cuStreamQuery cuStreamWaitEvent
  cuEventCreate cuEventDestroy_v2 cuEventRecord cuEventSynchronize cuEventElapsedTime cuMemFree_v2
  cuMemHostAlloc cuMemFreeHost cuMemHostRegister_v2 cuMemHostUnregister
  cuMemcpyHtoDAsync_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoDAsync_v2
  cuMemsetD8Async cuMemsetD32Async cuMemGetAllocationGranularity cuMemAddressReserve
  cuMemAddressFree cuMemRelease cuMemUnmap cuModuleLoadData cuModuleUnload cuModuleGetFunction
  cuFuncGetAttribute cuFuncSetAttribute cuOccupancyMaxActiveBlocksPerMultiprocessor
  cuStreamBeginCapture_v2 cuStreamEndCapture cuGraphDestroy cuGraphInstantiateWithFlags
  cuGraphExecUpdate_v2 cuGraphLaunch cuGraphExecDestroy`

let skip: string | false = false
try {
  execFileSync('gcc', ['--version'], { stdio: 'ignore' })
} catch {
  skip = 'there is no gcc to build the tin driver with'
}

const folder = mkdtempSync(join(tmpdir(), 'lattice-tin-driver-'))
let driver: CudaDriver
let seen: BigUint64Array

before(async () => {
  if (skip) return
  const rest = OTHERS.split(/\s+/).map((name) => `int ${name}(void) { return 0; }`)
  writeFileSync(join(folder, 'tin.c'), DRIVER + rest.join('\n'))
  const library = join(folder, 'libcuda.so.1')
  execFileSync('gcc', ['-O1', '-w', '-shared', '-fPIC', '-o', library, join(folder, 'tin.c')])
  process.env['LATTICE_CUDA_PATH'] = folder
  const { NativeCuda } = await import('./cuda-native.ts')
  driver = new NativeCuda()
  seen = new BigUint64Array(viewMemory(driver.retainContext(0), 16 * 8))
})
after(() => rmSync(folder, { recursive: true }))

function noted(count: number): number[] {
  return [...seen.subarray(0, count)].map(Number)
}

test('facts of a device land in the wrong field', { skip }, () => {
  const [device] = driver.devices()
  assert.equal(driver.version, 13000)
  assert.equal(device?.name, 'Tin GPU')
  assert.equal(device?.uuid, 'GPU-00010203-0405-0607-0809-0a0b0c0d0e0f')
  assert.equal(device?.memoryBytes, 80 * 2 ** 30)
  assert.equal(device?.capability, 90)
  assert.deepEqual(driver.memoryInfo(), { freeBytes: 5 * 2 ** 33, totalBytes: 80 * 2 ** 30 })
})

test('pages are created at, and allowed to, another place than was said', { skip }, () => {
  assert.equal(driver.createPages(2 << 20, { kind: 'device', device: 3 }), 77)
  assert.deepEqual(noted(6), [2 << 20, 1, 0, 1, 3, 0])
  driver.createPages(2 << 20, { kind: 'host', node: 1 })
  assert.deepEqual(noted(6), [2 << 20, 1, 0, 3, 1, 0])
  driver.map(0x7e0000200000, 2 << 20, 77)
  assert.deepEqual(noted(5), [0x7e0000200000, 2 << 20, 0, 77, 0])
  driver.allow(0x7e0000200000, 512 * 2 ** 20, 0)
  assert.deepEqual(noted(6), [0x7e0000200000, 512 * 2 ** 20, 1, 0, 3, 1])
  driver.fill16(0x7e0000200000, 0xffff, 2 ** 33, 9)
  assert.deepEqual(noted(4), [0x7e0000200000, 0xffff, 2 ** 33, 9])
})

test('a kernel is launched with other arguments than were set', { skip }, () => {
  const launch = new KernelLaunch(0x7f00000000f0, ['u64', 'i32', 'f32', 'bytes128'])
  launch.grid(7, 8, 9).threads(256).sharedBytes(99_000).cluster(2)
  launch.set(0, 0x7e0000200008).set(1, -5).set(2, 0.5)
  driver.launch(launch, 0x7f00000000a0)
  const half = 0x3f000000
  assert.deepEqual(noted(9), [0x7f00000000f0, 7, 9, 256, 99_000, 0x7f00000000a0, 1, 4, 2])
  assert.deepEqual(noted(14).slice(9), [0x7e0000200008, Number(2n ** 64n - 5n), half, 0, 0])
  assert.deepEqual([launch.get(0), launch.get(1), launch.get(2)], [0x7e0000200008, -5, 0.5])
  // Setting an attribute again replaces it.
  driver.launch(launch.cluster(4).programmatic(), 0)
  assert.deepEqual(noted(9).slice(5), [0, 2, 4, 4])
})

test('a tensor map describes another tensor', { skip }, () => {
  driver.encodeTensorMap(new NativeBlock(128).address, {
    dataType: 9,
    address: 0x7e0000200000,
    dimensions: [128, 8, 64],
    strides: [256, 2 ** 33],
    box: [64, 1, 32],
    swizzle: 3,
  })
  assert.deepEqual(noted(12), [9, 3, 0x7e0000200000, 128, 64, 256, 2 ** 33, 64, 32, 1, 3, 2])
})

test('an event that is not reached yet looks like a failure, or like one that is', { skip }, () => {
  assert.equal(driver.eventDone(1), false)
  assert.equal(driver.eventDone(2), true)
})

test('a graph that also fills memory passes for kernels only', { skip }, () => {
  assert.equal(driver.isKernels(0), true)
  assert.equal(driver.isKernels(1), false)
})

test("a failure does not name its call, CUDA's code and what to do", { skip }, () => {
  assert.throws(
    () => driver.allocate(2 ** 41),
    (thrown) =>
      thrown instanceof LatticeError &&
      thrown.code === 'gpu_call_failed' &&
      /cuMemAlloc failed with CUDA_ERROR_OUT_OF_MEMORY .bytes 2199023255552/.test(thrown.message) &&
      /--kv-memory/.test(thrown.todo ?? ''),
  )
})

test('a launch costs more than the call itself', { skip }, (t) => {
  const launch = new KernelLaunch(0x7f00000000f0, ['u64', 'i32', 'f32', 'u64']).set(0, 8)
  const repeat = 20_000
  for (let i = 0; i < repeat; i++) driver.launch(launch, 9)
  const start = performance.now()
  for (let i = 0; i < repeat; i++) driver.launch(launch.set(1, i), 9)
  // A note, not a bound: other work on the machine must not fail it.
  t.diagnostic(`${(((performance.now() - start) / repeat) * 1e6).toFixed(0)} ns a launch`)
  assert.equal(noted(11)[10], repeat - 1, 'the last argument was seen')
})
