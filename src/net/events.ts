// Owns the decisions that the ingress program tells of, one in so many: it reads them from a ring
// that the kernel writes, keeps the latest for whoever looks, and says each to a listener.

import { BpfRing } from '../ffi/bpf-ring.ts'
import type { BpfMap } from '../ffi/libbpf.ts'
import { EVENT } from './ingress-maps.ts'
import { type NetEvent, requestName } from './decisions.ts'
import { MESSAGE_CODES, MESSAGE_TYPES, type MessageCode } from './protocol.ts'

const KEPT = 1024
const LOOK_MS = 50
const NAMES = new Map<number, MessageCode>(
  Object.entries(MESSAGE_CODES).map(([name, code]) => [code, name as MessageCode]),
)

export class NetEvents {
  /** How many were told of. */
  count = 0
  private readonly ring: BpfRing
  private readonly kept: NetEvent[] = []
  private readonly listener: (event: NetEvent) => void
  private readonly timer: NodeJS.Timeout
  /** Unix time less the kernel's, in ms. */
  private readonly offsetMs = Date.now() - Number(process.hrtime.bigint()) / 1e6

  constructor(map: BpfMap, listener: (event: NetEvent) => void = () => {}) {
    this.ring = new BpfRing(map.fd, map.entries)
    this.listener = listener
    this.timer = setInterval(() => this.look(), LOOK_MS)
    this.timer.unref()
  }

  /** Reads what the kernel has written. */
  look(): void {
    this.ring.drain((view, at) => {
      const event = this.read(view, at)
      if (this.kept.push(event) > 2 * KEPT) this.kept.splice(0, KEPT)
      this.listener(event)
    })
  }

  /** Those after a number, of the latest thousand. */
  after(number: number): NetEvent[] {
    this.look()
    return this.kept.slice(-KEPT).filter((event) => event.number > number)
  }

  close(): void {
    clearInterval(this.timer)
    this.ring.close()
  }

  private read(view: DataView, at: number): NetEvent {
    const word = (field: number) => view.getUint32(at + field, true)
    const isGrant = view.getUint8(at + EVENT.type) === MESSAGE_TYPES.grant
    const isRepeat = view.getUint8(at + EVENT.isRepeat) !== 0
    return {
      number: ++this.count,
      timeMs: this.offsetMs + Number(view.getBigUint64(at + EVENT.ktimeNs, true)) / 1e6,
      decision: isRepeat ? 'repeat' : isGrant ? 'grant' : 'reject',
      code: NAMES.get(view.getUint16(at + EVENT.code, true)) ?? 'failed',
      request: requestName(view.getBigUint64(at + EVENT.request, true)),
      tenant: word(EVENT.tenant),
      replica: isGrant ? word(EVENT.route) - 1 : undefined,
      promptBytes: word(EVENT.promptBytes),
      maxTokens: word(EVENT.maxTokens),
      retryMs: word(EVENT.retryMs),
    }
  }
}
