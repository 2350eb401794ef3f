// Owns taking apart frames of which a part is held, so that the rest can be used elsewhere. What is
// held moves to spare frames of one column at the same addresses: so it never depends on memory
// that another process may take just then.

import type { CudaDevice } from './device.ts'
import type { Frame, FramePool } from './frames.ts'
import type { Pager } from './pager.ts'

export class TakeApart {
  /** Frames of which some columns are held and others not. */
  private readonly partial = new Set<Frame>()
  private readonly device: CudaDevice
  private readonly pager: Pager
  private readonly pool: FramePool
  /** Addresses of a group. */
  private readonly aside: number
  private readonly asideBytes: number
  private readonly stream: number

  constructor(device: CudaDevice, pager: Pager, pool: FramePool) {
    this.device = device
    this.pager = pager
    this.pool = pool
    this.asideBytes = pool.groupColumns * pool.pageBytes
    this.aside = device.driver.reserve(this.asideBytes)
    this.stream = device.driver.createStream()
    this.keepSpares()
  }

  /** It has another number of held columns than before. */
  note(frame: Frame): void {
    if (frame.held > 0 && frame.held < frame.columns) this.partial.add(frame)
    else this.partial.delete(frame)
  }

  /** One that can be taken apart, if there is any: its memory is there, and so are spares. */
  find(): Frame | undefined {
    const frame = [...this.partial].find(({ state, absent }) => state === 'used' && !absent)
    return frame && this.pool.spareColumns >= frame.held ? frame : undefined
  }

  /** Asks for spares, as many as a frame needs at most, unless they are there. */
  keepSpares(): void {
    this.pool.keepSpares(this.pool.groupColumns - 1)
  }

  /**
   * Gives what is held of a frame to smaller ones. It waits for everything; it is rare.
   * @param address of the frame in its own region
   * @param held columns of it, counted from its first
   * @param show maps a new frame where such a column was
   */
  split(
    frame: Frame,
    address: number,
    held: readonly number[],
    show: (small: Frame, i: number) => void,
  ): void {
    const { pager, pool, aside, stream } = this
    const { driver } = this.device
    const { pageBytes } = pool
    const bytes = frame.columns * pageBytes
    driver.synchronize()
    this.partial.delete(frame)
    pool.unmapAll(frame)
    pager.map(aside, bytes, frame.id)
    for (const i of held) {
      const small = pool.useSpare()
      small.held = 1
      show(small, i)
    }
    pager.wait(pager.ticket)
    for (const i of held) {
      driver.copyOnDevice(address + i * pageBytes, aside + i * pageBytes, pageBytes, stream)
    }
    driver.synchronizeStream(stream)
    pager.unmap(aside, bytes)
    pool.destroy(frame)
    this.keepSpares()
  }

  close(): void {
    const { driver } = this.device
    driver.destroyStream(this.stream)
    driver.freeReservation(this.aside, this.asideBytes)
  }
}
