// Owns the calls into NVIDIA's GPU driver (libcuda): their C types, and how failures are told.

import koffi, { type LibraryHandle } from 'koffi'
import { LatticeError } from '../errors.ts'
import { addressOf, cString, NativeBlock } from './block.ts'
import {
  type CudaDriver,
  DEVICE,
  type GpuDevice,
  type PageLocation,
  type TensorMapTiled,
} from './cuda.ts'
import { HINTS } from './cuda-hints.ts'
import { openCudaLibrary } from './cuda-libraries.ts'
import type { KernelLaunch } from './kernel-launch.ts'

const ptr = 'uintptr_t'

/** All return CUresult. */
const CALLS = {
  cuInit: ['uint'],
  cuDriverGetVersion: [ptr],
  cuDeviceGetCount: [ptr],
  cuDeviceGet: [ptr, 'int'],
  cuDeviceGetName: [ptr, 'int', 'int'],
  cuDeviceGetUuid_v2: [ptr, 'int'],
  cuDeviceTotalMem_v2: [ptr, 'int'],
  cuDeviceGetAttribute: [ptr, 'int', 'int'],
  cuDevicePrimaryCtxRetain: [ptr, 'int'],
  cuDevicePrimaryCtxRelease_v2: ['int'],
  cuCtxSetCurrent: [ptr],
  cuCtxSynchronize: [],
  cuStreamCreateWithPriority: [ptr, 'uint', 'int'],
  cuStreamDestroy_v2: [ptr],
  cuStreamSynchronize: [ptr],
  cuStreamQuery: [ptr],
  cuStreamWaitEvent: [ptr, ptr, 'uint'],
  cuEventCreate: [ptr, 'uint'],
  cuEventDestroy_v2: [ptr],
  cuEventRecord: [ptr, ptr],
  cuEventQuery: [ptr],
  cuEventSynchronize: [ptr],
  cuEventElapsedTime: [ptr, ptr, ptr],
  cuMemGetInfo_v2: [ptr, ptr],
  cuMemAlloc_v2: [ptr, 'size_t'],
  cuMemFree_v2: [ptr],
  cuMemHostAlloc: [ptr, 'size_t', 'uint'],
  cuMemFreeHost: [ptr],
  cuMemHostRegister_v2: [ptr, 'size_t', 'uint'],
  cuMemHostUnregister: [ptr],
  cuMemcpyHtoDAsync_v2: [ptr, ptr, 'size_t', ptr],
  cuMemcpyDtoHAsync_v2: [ptr, ptr, 'size_t', ptr],
  cuMemcpyDtoDAsync_v2: [ptr, ptr, 'size_t', ptr],
  cuMemsetD8Async: [ptr, 'uint8_t', 'size_t', ptr],
  cuMemsetD16Async: [ptr, 'uint16_t', 'size_t', ptr],
  cuMemsetD32Async: [ptr, 'uint32_t', 'size_t', ptr],
  cuMemGetAllocationGranularity: [ptr, ptr, 'int'],
  cuMemAddressReserve: [ptr, 'size_t', 'size_t', ptr, 'uint64_t'],
  cuMemAddressFree: [ptr, 'size_t'],
  cuMemCreate: [ptr, 'size_t', ptr, 'uint64_t'],
  cuMemRelease: ['uint64_t'],
  cuMemMap: [ptr, 'size_t', 'size_t', 'uint64_t', 'uint64_t'],
  cuMemUnmap: [ptr, 'size_t'],
  cuMemSetAccess: [ptr, 'size_t', ptr, 'size_t'],
  cuModuleLoadData: [ptr, ptr],
  cuModuleUnload: [ptr],
  cuModuleGetFunction: [ptr, ptr, ptr],
  cuFuncGetAttribute: [ptr, 'int', ptr],
  cuFuncSetAttribute: [ptr, 'int', 'int'],
  cuOccupancyMaxActiveBlocksPerMultiprocessor: [ptr, ptr, 'int', 'size_t'],
  cuLaunchKernelEx: [ptr, ptr, ptr, ptr],
  cuStreamBeginCapture_v2: [ptr, 'int'],
  cuStreamEndCapture: [ptr, ptr],
  cuGraphDestroy: [ptr],
  cuGraphGetNodes: [ptr, ptr, ptr],
  cuGraphNodeGetType: [ptr, ptr],
  cuGraphInstantiateWithFlags: [ptr, ptr, 'uint64_t'],
  cuGraphExecUpdate_v2: [ptr, ptr, ptr],
  cuGraphLaunch: [ptr, ptr],
  cuGraphExecDestroy: [ptr],
  cuTensorMapEncodeTiled: [
    ...[ptr, 'int', 'uint', ptr, ptr, ptr, ptr, ptr],
    ...['int', 'int', 'int', 'int'],
  ],
} as const satisfies Record<string, readonly string[]>

type CallName = keyof typeof CALLS
type Calls = Readonly<Record<CallName, (...args: readonly number[]) => number>>

const NOT_READY = 600
const GRAPH_EXEC_UPDATE_FAILURE = 910
const STREAM_NON_BLOCKING = 1
const EVENT_DISABLE_TIMING = 2
const HOST_ALLOC_PORTABLE = 1
const CAPTURE_THREAD_LOCAL = 1
const KERNEL_NODE = 0
const ALLOCATION_PINNED = 1
const LOCATION_DEVICE = 1
const LOCATION_HOST_NUMA = 3
const ACCESS_READ_WRITE = 3

export class NativeCuda implements CudaDriver {
  readonly version: number
  readonly path: string
  private readonly calls: Calls
  private readonly name: (code: number, out: number) => number
  /** Results of calls, and structures they read. */
  private readonly out = new NativeBlock(64)
  private readonly at: number
  private readonly properties = new NativeBlock(32)
  private readonly access = new NativeBlock(16)
  private readonly tensorArrays = new NativeBlock(5 * 8 * 2 + 5 * 4 * 2)

  /** @throws LatticeError `backend_unavailable` without driver, `gpu_call_failed` without GPU */
  constructor() {
    const { handle, path } = openCudaLibrary('driver')
    this.calls = bind(handle)
    this.name = handle.func('cuGetErrorName', 'int', ['int', ptr])
    this.path = path
    this.at = this.out.address
    this.check(this.calls.cuInit(0), 'cuInit')
    this.check(this.calls.cuDriverGetVersion(this.at), 'cuDriverGetVersion')
    this.version = this.outInt
  }

  devices(): GpuDevice[] {
    this.check(this.calls.cuDeviceGetCount(this.at), 'cuDeviceGetCount')
    return Array.from({ length: this.outInt }, (_, index) => this.describe(index))
  }

  attribute(device: number, attribute: number): number {
    const result = this.calls.cuDeviceGetAttribute(this.at, attribute, device)
    this.check(result, 'cuDeviceGetAttribute')
    return this.outInt
  }

  retainContext(device: number): number {
    this.check(this.calls.cuDevicePrimaryCtxRetain(this.at, device), 'cuDevicePrimaryCtxRetain')
    return this.outNumber
  }

  releaseContext(device: number): void {
    this.check(this.calls.cuDevicePrimaryCtxRelease_v2(device), 'cuDevicePrimaryCtxRelease')
  }

  setContext(context: number): void {
    this.check(this.calls.cuCtxSetCurrent(context), 'cuCtxSetCurrent')
  }

  synchronize(): void {
    this.check(this.calls.cuCtxSynchronize(), 'cuCtxSynchronize')
  }

  createStream(priority = 0): number {
    const { cuStreamCreateWithPriority } = this.calls
    const result = cuStreamCreateWithPriority(this.at, STREAM_NON_BLOCKING, priority)
    this.check(result, 'cuStreamCreateWithPriority')
    return this.outNumber
  }

  destroyStream(stream: number): void {
    this.check(this.calls.cuStreamDestroy_v2(stream), 'cuStreamDestroy')
  }

  synchronizeStream(stream: number): void {
    this.check(this.calls.cuStreamSynchronize(stream), 'cuStreamSynchronize')
  }

  streamDone(stream: number): boolean {
    return this.ready(this.calls.cuStreamQuery(stream), 'cuStreamQuery')
  }

  waitEvent(stream: number, event: number): void {
    this.check(this.calls.cuStreamWaitEvent(stream, event, 0), 'cuStreamWaitEvent')
  }

  createEvent(timing = false): number {
    const flags = timing ? 0 : EVENT_DISABLE_TIMING
    this.check(this.calls.cuEventCreate(this.at, flags), 'cuEventCreate')
    return this.outNumber
  }

  destroyEvent(event: number): void {
    this.check(this.calls.cuEventDestroy_v2(event), 'cuEventDestroy')
  }

  recordEvent(event: number, stream: number): void {
    this.check(this.calls.cuEventRecord(event, stream), 'cuEventRecord')
  }

  eventDone(event: number): boolean {
    return this.ready(this.calls.cuEventQuery(event), 'cuEventQuery')
  }

  synchronizeEvent(event: number): void {
    this.check(this.calls.cuEventSynchronize(event), 'cuEventSynchronize')
  }

  elapsedMs(start: number, end: number): number {
    this.check(this.calls.cuEventElapsedTime(this.at, start, end), 'cuEventElapsedTime')
    return this.out.f32[0] ?? 0
  }

  memoryInfo(): { freeBytes: number; totalBytes: number } {
    this.check(this.calls.cuMemGetInfo_v2(this.at, this.at + 8), 'cuMemGetInfo')
    return { freeBytes: this.out.number(0), totalBytes: this.out.number(8) }
  }

  allocate(bytes: number): number {
    this.check(this.calls.cuMemAlloc_v2(this.at, bytes), 'cuMemAlloc', { bytes })
    return this.outNumber
  }

  free(address: number): void {
    this.check(this.calls.cuMemFree_v2(address), 'cuMemFree')
  }

  allocateHost(bytes: number): number {
    const result = this.calls.cuMemHostAlloc(this.at, bytes, HOST_ALLOC_PORTABLE)
    this.check(result, 'cuMemHostAlloc', { bytes })
    return this.outNumber
  }

  freeHost(address: number): void {
    this.check(this.calls.cuMemFreeHost(address), 'cuMemFreeHost')
  }

  registerHost(address: number, bytes: number): void {
    const result = this.calls.cuMemHostRegister_v2(address, bytes, HOST_ALLOC_PORTABLE)
    this.check(result, 'cuMemHostRegister', { bytes })
  }

  unregisterHost(address: number): void {
    this.check(this.calls.cuMemHostUnregister(address), 'cuMemHostUnregister')
  }

  copyToDevice(to: number, from: number, bytes: number, stream: number): void {
    this.check(this.calls.cuMemcpyHtoDAsync_v2(to, from, bytes, stream), 'cuMemcpyHtoDAsync')
  }

  copyToHost(to: number, from: number, bytes: number, stream: number): void {
    this.check(this.calls.cuMemcpyDtoHAsync_v2(to, from, bytes, stream), 'cuMemcpyDtoHAsync')
  }

  copyOnDevice(to: number, from: number, bytes: number, stream: number): void {
    this.check(this.calls.cuMemcpyDtoDAsync_v2(to, from, bytes, stream), 'cuMemcpyDtoDAsync')
  }

  fill8(address: number, value: number, count: number, stream: number): void {
    this.check(this.calls.cuMemsetD8Async(address, value, count, stream), 'cuMemsetD8Async')
  }

  fill16(address: number, value: number, count: number, stream: number): void {
    this.check(this.calls.cuMemsetD16Async(address, value, count, stream), 'cuMemsetD16Async')
  }

  fill32(address: number, value: number, count: number, stream: number): void {
    this.check(this.calls.cuMemsetD32Async(address, value, count, stream), 'cuMemsetD32Async')
  }

  pageBytes(location: PageLocation): number {
    const properties = this.locate(location)
    const result = this.calls.cuMemGetAllocationGranularity(this.at, properties, 0)
    this.check(result, 'cuMemGetAllocationGranularity')
    return this.outNumber
  }

  reserve(bytes: number, alignment = 0): number {
    const result = this.calls.cuMemAddressReserve(this.at, bytes, alignment, 0, 0)
    this.check(result, 'cuMemAddressReserve', { bytes })
    return this.outNumber
  }

  freeReservation(address: number, bytes: number): void {
    this.check(this.calls.cuMemAddressFree(address, bytes), 'cuMemAddressFree')
  }

  createPages(bytes: number, location: PageLocation): number {
    const result = this.calls.cuMemCreate(this.at, bytes, this.locate(location), 0)
    this.check(result, 'cuMemCreate', { bytes })
    return this.outNumber
  }

  releasePages(handle: number): void {
    this.check(this.calls.cuMemRelease(handle), 'cuMemRelease')
  }

  map(address: number, bytes: number, handle: number): void {
    this.check(this.calls.cuMemMap(address, bytes, 0, handle, 0), 'cuMemMap', { bytes })
  }

  unmap(address: number, bytes: number): void {
    this.check(this.calls.cuMemUnmap(address, bytes), 'cuMemUnmap', { bytes })
  }

  allow(address: number, bytes: number, device: number): void {
    this.access.u32.set([LOCATION_DEVICE, device, ACCESS_READ_WRITE])
    const result = this.calls.cuMemSetAccess(address, bytes, this.access.address, 1)
    this.check(result, 'cuMemSetAccess', { bytes })
  }

  loadModule(image: Uint8Array): number {
    this.check(this.calls.cuModuleLoadData(this.at, addressOf(image)), 'cuModuleLoadData')
    return this.outNumber
  }

  unloadModule(module: number): void {
    this.check(this.calls.cuModuleUnload(module), 'cuModuleUnload')
  }

  functionOf(module: number, name: string): number {
    const text = cString(name)
    const result = this.calls.cuModuleGetFunction(this.at, module, text.address)
    this.check(result, 'cuModuleGetFunction', { kernel: name })
    return this.outNumber
  }

  functionAttribute(kernel: number, attribute: number): number {
    const result = this.calls.cuFuncGetAttribute(this.at, attribute, kernel)
    this.check(result, 'cuFuncGetAttribute')
    return this.outInt
  }

  setFunctionAttribute(kernel: number, attribute: number, value: number): void {
    const result = this.calls.cuFuncSetAttribute(kernel, attribute, value)
    this.check(result, 'cuFuncSetAttribute', { attribute, value })
  }

  blocksPerMultiprocessor(kernel: number, threads: number, dynamicSharedBytes: number): number {
    const { cuOccupancyMaxActiveBlocksPerMultiprocessor: call } = this.calls
    const result = call(this.at, kernel, threads, dynamicSharedBytes)
    this.check(result, 'cuOccupancyMaxActiveBlocksPerMultiprocessor')
    return this.outInt
  }

  launch(launch: KernelLaunch, stream: number): void {
    launch.stream = stream
    const { configAddress, kernel, argumentsAddress } = launch
    const result = this.calls.cuLaunchKernelEx(configAddress, kernel, argumentsAddress, 0)
    if (result !== 0) throw this.failure(result, 'cuLaunchKernelEx')
  }

  beginCapture(stream: number): void {
    const result = this.calls.cuStreamBeginCapture_v2(stream, CAPTURE_THREAD_LOCAL)
    this.check(result, 'cuStreamBeginCapture')
  }

  endCapture(stream: number): number {
    this.check(this.calls.cuStreamEndCapture(stream, this.at), 'cuStreamEndCapture')
    return this.outNumber
  }

  destroyGraph(graph: number): void {
    this.check(this.calls.cuGraphDestroy(graph), 'cuGraphDestroy')
  }

  isKernels(graph: number): boolean {
    const { cuGraphGetNodes, cuGraphNodeGetType } = this.calls
    this.check(cuGraphGetNodes(graph, 0, this.at), 'cuGraphGetNodes')
    const nodes = new NativeBlock(this.outNumber * 8)
    this.check(cuGraphGetNodes(graph, nodes.address, this.at), 'cuGraphGetNodes')
    return Array.from({ length: this.outNumber }, (_, i) => nodes.number(i * 8)).every((node) => {
      this.check(cuGraphNodeGetType(node, this.at), 'cuGraphNodeGetType')
      return this.outInt === KERNEL_NODE
    })
  }

  instantiate(graph: number): number {
    this.check(this.calls.cuGraphInstantiateWithFlags(this.at, graph, 0), 'cuGraphInstantiate')
    return this.outNumber
  }

  updateGraph(executable: number, graph: number): boolean {
    const result = this.calls.cuGraphExecUpdate_v2(executable, graph, this.at)
    if (result === GRAPH_EXEC_UPDATE_FAILURE) return false
    this.check(result, 'cuGraphExecUpdate')
    return true
  }

  launchGraph(executable: number, stream: number): void {
    this.check(this.calls.cuGraphLaunch(executable, stream), 'cuGraphLaunch')
  }

  destroyExecutable(executable: number): void {
    this.check(this.calls.cuGraphExecDestroy(executable), 'cuGraphExecDestroy')
  }

  encodeTensorMap(into: number, tensor: TensorMapTiled): void {
    const { dimensions, strides, box } = tensor
    const { address, u32 } = this.tensorArrays
    dimensions.forEach((length, i) => this.tensorArrays.setNumber(i * 8, length))
    strides.forEach((bytes, i) => this.tensorArrays.setNumber(40 + i * 8, bytes))
    u32.set(box, 80 / 4)
    u32.set(tensor.elementStrides ?? dimensions.map(() => 1), 100 / 4)
    const result = this.calls.cuTensorMapEncodeTiled(
      ...[into, tensor.dataType, dimensions.length, tensor.address],
      ...[address, address + 40, address + 80, address + 100],
      ...[0, tensor.swizzle ?? 0, tensor.l2Promotion ?? 2, 0],
    )
    this.check(result, 'cuTensorMapEncodeTiled')
  }

  private describe(index: number): GpuDevice {
    this.check(this.calls.cuDeviceGet(this.at, index), 'cuDeviceGet')
    const device = this.outInt
    const text = new NativeBlock(256)
    this.check(this.calls.cuDeviceGetName(text.address, 256, device), 'cuDeviceGetName')
    const name = Buffer.from(text.bytes).toString('utf8').replace(/\0.*/s, '')
    this.check(this.calls.cuDeviceGetUuid_v2(this.at, device), 'cuDeviceGetUuid')
    const uuid = Buffer.from(this.out.bytes.subarray(0, 16)).toString('hex')
    this.check(this.calls.cuDeviceTotalMem_v2(this.at, device), 'cuDeviceTotalMem')
    const memoryBytes = this.outNumber
    const get = (attribute: number): number => this.attribute(device, attribute)
    return {
      index,
      name,
      uuid: `GPU-${uuid.replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-')}`,
      memoryBytes,
      capability: get(DEVICE.capabilityMajor) * 10 + get(DEVICE.capabilityMinor),
      multiprocessors: get(DEVICE.multiprocessors),
      l2Bytes: get(DEVICE.l2Bytes),
      sharedBytesPerBlock: get(DEVICE.sharedBytesPerBlock),
      virtualMemory: get(DEVICE.virtualMemory) === 1,
      hostNumaNode: this.version >= 12020 ? get(DEVICE.hostNumaNode) : -1,
      hostPages: this.version >= 12020 && get(DEVICE.hostNumaVirtualMemory) === 1,
    }
  }

  /** Writes CUmemAllocationProp and says where. */
  private locate(location: PageLocation): number {
    const device = location.kind === 'device'
    this.properties.u32.set([
      ALLOCATION_PINNED,
      0,
      device ? LOCATION_DEVICE : LOCATION_HOST_NUMA,
      device ? location.device : location.node,
    ])
    return this.properties.address
  }

  private get outInt(): number {
    return this.out.i32[0] ?? 0
  }

  private get outNumber(): number {
    return this.out.number(0)
  }

  private ready(result: number, call: string): boolean {
    if (result === NOT_READY) return false
    this.check(result, call)
    return true
  }

  private check(result: number, call: string, more?: Record<string, number | string>): void {
    if (result !== 0) throw this.failure(result, call, more)
  }

  private failure(
    result: number,
    call: string,
    more: Record<string, number | string> = {},
  ): LatticeError {
    const known = this.name(result, this.at) === 0
    const name = known ? koffi.decode.string(BigInt(this.outNumber)) : `code ${result}`
    const values = Object.entries(more).map(([key, value]) => `${key} ${value}`)
    const about = values.length > 0 ? ` (${values.join(', ')})` : ''
    return new LatticeError('gpu_call_failed', `${call} failed with ${name}${about}.`, {
      todo: HINTS[result] ?? '`lattice inspect gpu` shows the GPU and its driver.',
      details: { call, code: name, ...more },
    })
  }
}

function bind(library: LibraryHandle): Calls {
  const calls: Record<string, unknown> = {}
  for (const [name, types] of Object.entries(CALLS)) {
    try {
      calls[name] = library.func(name, 'int', [...types])
    } catch (cause) {
      throw new LatticeError('backend_unavailable', `NVIDIA's GPU driver has no ${name}.`, {
        todo: 'It is too old: update the driver to 550 or later.',
        cause,
      })
    }
  }
  return calls as Calls
}
