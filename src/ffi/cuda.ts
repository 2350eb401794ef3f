// Owns the contract with NVIDIA's GPU driver: which calls Lattice makes, in its own words. The
// driver itself (cuda-native.ts) fulfils it; so does the strict mock that tests run on.
//
// Addresses, handles, streams, events, modules, functions and graphs are numbers. Sizes are bytes.
// Every call throws LatticeError `gpu_call_failed`, naming the call, CUDA's code and what to do.
// A thread calls `setContext` before anything but `devices` and `retainContext`. Streams never
// wait for the legacy default stream; nothing here is ever queued there but what says so.

import type { KernelLaunch } from './kernel-launch.ts'

/** CUdevice_attribute. */
export const DEVICE = {
  clockKhz: 13,
  multiprocessors: 16,
  integrated: 18,
  pciBus: 33,
  pciDevice: 34,
  memoryClockKhz: 36,
  memoryBusBits: 37,
  l2Bytes: 38,
  copyEngines: 40,
  pciDomain: 50,
  capabilityMajor: 75,
  capabilityMinor: 76,
  sharedBytesPerMultiprocessor: 81,
  sharedBytesPerBlock: 97,
  virtualMemory: 102,
  hostNumaNode: 134,
  hostNumaVirtualMemory: 141,
} as const

/** CUfunction_attribute: the first three are read, the others also set. */
export const FUNCTION = {
  sharedBytes: 1,
  localBytes: 3,
  registers: 4,
  dynamicSharedBytesMax: 8,
  sharedCarveoutPercent: 9,
  clusterBeyondPortable: 14,
} as const

/** Where physical pages lie: on the GPU, or in the memory of one of the host's NUMA nodes. */
export type PageLocation =
  | { readonly kind: 'device'; readonly device: number }
  | { readonly kind: 'host'; readonly node: number }

export interface GpuDevice {
  index: number
  name: string
  /** As nvidia-smi prints it: GPU-xxxxxxxx-xxxx-… */
  uuid: string
  memoryBytes: number
  /** Compute capability, such as 90 for 9.0. */
  capability: number
  multiprocessors: number
  l2Bytes: number
  /** What one block may have when it asks for it. */
  sharedBytesPerBlock: number
  virtualMemory: boolean
  /** The NUMA node nearest to it, and whether pages there can be mapped on it. */
  hostNumaNode: number
  hostPages: boolean
}

/** A tiled tensor for the copy engine (cuTensorMapEncodeTiled), innermost dimension first. */
export interface TensorMapTiled {
  /** CUtensorMapDataType: 0 uint8, 1 uint16, 2 uint32, 6 float16, 7 float32, 9 bfloat16. */
  dataType: number
  address: number
  dimensions: readonly number[]
  /** Bytes from an element to the next of each dimension but the first: multiples of 16. */
  strides: readonly number[]
  box: readonly number[]
  elementStrides?: readonly number[]
  /** 0 none, 1 32 B, 2 64 B, 3 128 B. */
  swizzle?: number
  /** 0 none, 1 64 B, 2 128 B, 3 256 B. */
  l2Promotion?: number
}

export interface CudaDriver extends CudaStreams, CudaMemory, CudaPages, CudaKernels {
  /** What the driver supports at most: 13000 is CUDA 13.0. */
  readonly version: number
  /** What was loaded. */
  readonly path: string
  /** All GPUs that this process sees. Needs no context. */
  devices(): GpuDevice[]
  attribute(device: number, attribute: number): number
  /** The context that everything in this process shares; one more `releaseContext` is due. */
  retainContext(device: number): number
  releaseContext(device: number): void
  /** Makes a context that of the calling thread. */
  setContext(context: number): void
  /** Waits for all work of the context. */
  synchronize(): void
}

export interface CudaStreams {
  /** @param priority lower runs first; 0 by default, -5 is the highest on present GPUs */
  createStream(priority?: number): number
  destroyStream(stream: number): void
  synchronizeStream(stream: number): void
  /** Whether everything that was queued has been done. */
  streamDone(stream: number): boolean
  /** What is queued from now on waits for the event as it is recorded now. */
  waitEvent(stream: number, event: number): void
  /** @param timing events without it cost less to record */
  createEvent(timing?: boolean): number
  destroyEvent(event: number): void
  recordEvent(event: number, stream: number): void
  /** Whether the event's last record has been reached; true if it never was recorded. */
  eventDone(event: number): boolean
  synchronizeEvent(event: number): void
  /** Milliseconds between two recorded events, resolution about 0.5 µs. */
  elapsedMs(start: number, end: number): number
}

export interface CudaMemory {
  memoryInfo(): { freeBytes: number; totalBytes: number }
  allocate(bytes: number): number
  free(address: number): void
  /** Pinned host memory; the GPU sees it at the same address. */
  allocateHost(bytes: number): number
  freeHost(address: number): void
  /** Pins memory of the host that is mapped already, for the GPU to copy to and from. */
  registerHost(address: number, bytes: number): void
  unregisterHost(address: number): void
  /** Host addresses that are not pinned make these calls wait. */
  copyToDevice(to: number, from: number, bytes: number, stream: number): void
  copyToHost(to: number, from: number, bytes: number, stream: number): void
  copyOnDevice(to: number, from: number, bytes: number, stream: number): void
  fill8(address: number, value: number, count: number, stream: number): void
  fill16(address: number, value: number, count: number, stream: number): void
  fill32(address: number, value: number, count: number, stream: number): void
}

/**
 * The driver's virtual memory: addresses are reserved, physical pages are created, and mapped
 * anywhere any number of times. None of it waits for running kernels, so nothing may be unmapped
 * while a kernel that reads it could still run.
 */
export interface CudaPages {
  /** The least size, and unit, of physical pages: 2 MiB on all GPUs so far. */
  pageBytes(location: PageLocation): number
  reserve(bytes: number, alignment?: number): number
  freeReservation(address: number, bytes: number): void
  /** @returns a handle */
  createPages(bytes: number, location: PageLocation): number
  /** The memory goes back to the system when the last mapping of it has gone, too. */
  releasePages(handle: number): void
  /** Maps a whole handle; unreadable until `allow`. */
  map(address: number, bytes: number, handle: number): void
  /** Of whole mappings; several that lie side by side may go in one call. */
  unmap(address: number, bytes: number): void
  /** Lets a device read and write a mapped range (of any number of handles). */
  allow(address: number, bytes: number, device: number): void
}

export interface CudaKernels {
  /** @param image a cubin, PTX or fat binary */
  loadModule(image: Uint8Array): number
  unloadModule(module: number): void
  /** A kernel's function; declare kernels `extern "C"`. */
  functionOf(module: number, name: string): number
  functionAttribute(kernel: number, attribute: number): number
  setFunctionAttribute(kernel: number, attribute: number, value: number): void
  /** Blocks of a kernel that one multiprocessor runs at once. */
  blocksPerMultiprocessor(kernel: number, threads: number, dynamicSharedBytes: number): number
  /** Queues a kernel. The arguments are read now: change them for the next launch freely. */
  launch(launch: KernelLaunch, stream: number): void
  /** From now on what this thread queues on the stream is recorded, not run. */
  beginCapture(stream: number): void
  /** @returns a graph */
  endCapture(stream: number): number
  destroyGraph(graph: number): void
  /**
   * Whether a graph is kernels only. Launching one costs the CPU some 4 µs, of any length; with a
   * single fill among them 10 to 20, with one in each of 32 layers 60 to 100 (driver 580).
   */
  isKernels(graph: number): boolean
  /** @returns a graph that can be launched */
  instantiate(graph: number): number
  /**
   * Gives an executable graph the parameters of another graph of the same shape.
   * @returns false if the shapes differ: then instantiate anew
   */
  updateGraph(executable: number, graph: number): boolean
  launchGraph(executable: number, stream: number): void
  destroyExecutable(executable: number): void
  /** Writes the 128 bytes of a tensor map at `into`, a host address that is a multiple of 64. */
  encodeTensorMap(into: number, tensor: TensorMapTiled): void
}
