// Owns the GPU that the hashing backend runs on where there is one: every access waits until it has
// happened.

import { ThreadPager } from '../../src/backends/cuda/pager.ts'
import { addressOf } from '../../src/ffi/block.ts'
import type { NativeCuda } from '../../src/ffi/cuda-native.ts'
import type { Gpu } from '../support/hashing-backend.ts'

export function realGpu(cuda: NativeCuda): Gpu {
  return {
    driver: cuda,
    pager: (device) => new ThreadPager(device),
    read(address, bytes, stream) {
      const copy = new Uint8Array(bytes)
      cuda.copyToHost(addressOf(copy), address, bytes, stream)
      cuda.synchronizeStream(stream)
      return copy
    },
    write(address, data, stream) {
      cuda.copyToDevice(address, addressOf(data), data.length, stream)
      cuda.synchronizeStream(stream)
    },
    queue: (_stream, work) => work.run(),
  }
}
