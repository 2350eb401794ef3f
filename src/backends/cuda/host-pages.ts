// Owns memory of the host that a GPU copies to and from at the full rate of its bus: a memfd, so
// that the disk tier can move its pages as it moves those of the host's own KV memory, mapped once
// and pinned by the driver.

import { LatticeError } from '../../errors.ts'
import type { CudaDriver } from '../../ffi/cuda.ts'
import { closeFd, createMemfd, mapShared, unmap } from '../../ffi/libc.ts'

export class HostPages {
  readonly frames: number
  readonly pageBytes: number
  /** Of frame 0. */
  readonly address: number
  readonly fd: number
  private readonly driver: CudaDriver
  private closed = false

  /** @throws LatticeError `gpu_call_failed` if so much cannot be pinned */
  constructor(driver: CudaDriver, frames: number, pageBytes: number) {
    this.driver = driver
    this.frames = frames
    this.pageBytes = pageBytes
    this.fd = createMemfd('lattice-kv-host', this.bytes)
    this.address = mapShared(this.fd, this.bytes)
    try {
      driver.registerHost(this.address, this.bytes)
    } catch (thrown) {
      unmap(this.address, this.bytes)
      closeFd(this.fd)
      if (!(thrown instanceof LatticeError)) throw thrown
      throw new LatticeError(thrown.code, `${this.bytes} bytes could not be pinned for the GPU.`, {
        todo: 'Give --kv-host less, or allow more locked memory (ulimit -l).',
        cause: thrown,
      })
    }
  }

  get bytes(): number {
    return this.frames * this.pageBytes
  }

  close(): void {
    if (this.closed) return
    this.closed = true
    this.driver.unregisterHost(this.address)
    unmap(this.address, this.bytes)
    closeFd(this.fd)
  }
}
