// Owns one end of the unix socket between an interface's owner and an engine that joined it: frames
// out, many in one system call; frames in; and hanging up on a peer that makes no sense or does not
// read.

import type { Socket } from 'node:net'
import { LatticeError } from '../errors.ts'
import { FrameReader, frameHeader, type JoinFrame, type JoinType } from './join-frames.ts'

/** A peer that has so much to read is not reading: the largest prompt, and as much again. */
const UNREAD_BYTES_MAX = 128 << 20

export interface WireEvents {
  take(frame: JoinFrame): void
  /** Once: nothing more comes. Undefined if the other side ended it. */
  lost(why: LatticeError | undefined): void
  /** All that was sent is the kernel's. */
  drained?(): void
}

export class JoinWire {
  private readonly socket: Socket
  private readonly reader = new FrameReader()
  private corked = false
  private why: LatticeError | undefined

  constructor(socket: Socket, events: WireEvents) {
    this.socket = socket
    socket.on('data', (chunk: Buffer) => {
      if (this.why || this.reader.read(chunk, events.take)) return
      this.hangUp(new LatticeError('net_refused', 'The other side sends what is no frame.'))
    })
    socket.on('drain', () => events.drained?.())
    // 'close' follows.
    socket.on('error', (cause) => {
      this.why ??= new LatticeError('net_refused', `The socket failed: ${cause.message}.`, {
        cause,
      })
    })
    socket.once('close', () => events.lost(this.why))
  }

  /** Bytes that the other side has not taken. */
  get unread(): number {
    return this.socket.writableLength
  }

  /** Parts follow each other in one frame; none is copied. */
  send(type: JoinType, id = 0, code = 0, ...parts: Uint8Array[]): void {
    const { socket } = this
    if (socket.destroyed || socket.writableEnded) return
    if (!this.corked) {
      // Together with what else this turn of the event loop has to say.
      this.corked = true
      socket.cork()
      setImmediate(() => {
        this.corked = false
        socket.uncork()
      })
    }
    socket.write(
      frameHeader(
        type,
        id,
        code,
        parts.reduce((sum, part) => sum + part.length, 0),
      ),
    )
    for (const part of parts) if (part.length > 0) socket.write(part)
    if (socket.writableLength <= UNREAD_BYTES_MAX) return
    const what = `The other side leaves ${socket.writableLength} bytes unread.`
    this.hangUp(new LatticeError('net_refused', what))
  }

  /** Says what was sent, then ends. */
  end(): void {
    this.socket.end()
  }

  /** Ends at once. */
  hangUp(why?: LatticeError): void {
    this.why ??= why
    this.socket.destroy()
  }
}
