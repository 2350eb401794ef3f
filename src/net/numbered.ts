// Owns getting numbered datagrams across: what to send again and when, what has arrived and when
// to say so. Pure, driven by a clock that the caller has; docs/protocol.md says the rules.
//
//   sender    0 1 2 3 4 5 6 │ 7 8 …        receiver   0 1 2 · 4 5 ·
//             acknowledged up to a window               └ first missing; a bit for each after it

export interface SenderLimits {
  /** Datagrams beyond the first that is missing, at most. */
  window: number
  /** Everything unacknowledged goes again after so long, then after twice as long, and so on. */
  repeatMs: number
  repeatMsMax: number
  /** After so many times in a row it is given up. */
  repeats: number
}

export const SENDER_LIMITS: SenderLimits = {
  window: 64,
  repeatMs: 50,
  repeatMsMax: 2000,
  repeats: 10,
}

const NEVER = -Infinity

export class NumberedSender {
  /** All before this one have arrived. */
  firstMissing = 0
  /** How many there are to be sent so far. */
  total = 0
  /** It was repeated too often: nobody is there. */
  failed = false
  private readonly limits: SenderLimits
  private window: number
  /** By number from `firstMissing` on: when it was sent last, and whether it has arrived. */
  private readonly sentMs: number[] = []
  private readonly arrived: boolean[] = []
  private readonly sentAgain: boolean[] = []
  /** Missing behind something that arrived: to be sent again at once. */
  private readonly lost = new Set<number>()
  private rttMs: number
  private waitMs: number
  private repeated = 0
  private sinceMs = Infinity

  constructor(limits: Partial<SenderLimits> = {}) {
    this.limits = { ...SENDER_LIMITS, ...limits }
    this.window = this.limits.window
    this.waitMs = this.limits.repeatMs
    this.rttMs = this.limits.repeatMs
  }

  /** Says that datagrams up to this number (exclusive) exist. */
  extend(total: number): void {
    this.total = Math.max(this.total, total)
  }

  get done(): boolean {
    return this.firstMissing === this.total
  }

  /** Numbers to send now, in order. */
  due(nowMs: number): number[] {
    if (this.failed) return []
    const sent = this.firstMissing + this.sentMs.length
    if (nowMs - this.sinceMs >= this.waitMs) this.#repeatAll(nowMs)
    const numbers = [...this.lost].toSorted((a, b) => a - b)
    this.lost.clear()
    for (const number of numbers) {
      this.sentMs[number - this.firstMissing] = nowMs
      this.sentAgain[number - this.firstMissing] = true
    }
    const end = Math.min(this.total, this.firstMissing + this.window)
    for (let number = sent; number < end; number++) {
      this.sentMs.push(nowMs)
      this.arrived.push(false)
      this.sentAgain.push(false)
      numbers.push(number)
    }
    if (numbers.length > 0 && this.sinceMs === Infinity) this.sinceMs = nowMs
    return this.failed ? [] : numbers
  }

  /** When `due` has something again if nothing arrives before; undefined if never. */
  nextMs(): number | undefined {
    if (this.failed || this.sinceMs === Infinity) return undefined
    return this.sinceMs + this.waitMs
  }

  /**
   * Takes in what the receiver says.
   * @param bitmap bit i: number firstMissing + 1 + i has arrived
   * @param window how many may be under way from now on
   */
  acknowledge(firstMissing: number, bitmap: bigint, window: number, nowMs: number): void {
    const known = this.firstMissing + this.sentMs.length
    // Older than one that came before it, or of what was never sent.
    if (firstMissing < this.firstMissing || firstMissing > known) return
    // With none at all nothing could ever be heard of a larger one.
    this.window = Math.max(1, Math.min(window, this.limits.window))
    const news = firstMissing > this.firstMissing
    for (; this.firstMissing < firstMissing; this.firstMissing++) {
      this.#measure(nowMs)
      this.sentMs.shift()
      this.arrived.shift()
      this.sentAgain.shift()
      this.lost.delete(this.firstMissing)
    }
    let last = -1
    for (let i = 0; bitmap !== 0n && i < 64; i++) {
      if (((bitmap >> BigInt(i)) & 1n) === 0n || firstMissing + 1 + i >= known) continue
      this.arrived[1 + i] = true
      this.lost.delete(firstMissing + 1 + i)
      last = 1 + i
    }
    for (let i = 0; i < last; i++) {
      const oldEnough = nowMs - (this.sentMs[i] ?? NEVER) >= this.rttMs
      if (!this.arrived[i] && oldEnough) this.lost.add(firstMissing + i)
    }
    if (news) {
      this.repeated = 0
      this.waitMs = this.limits.repeatMs
      this.sinceMs = this.sentMs.length > 0 ? nowMs : Infinity
    }
  }

  #repeatAll(nowMs: number): void {
    if (++this.repeated > this.limits.repeats) {
      this.failed = true
      return
    }
    this.arrived.forEach((arrived, i) => {
      if (!arrived) this.lost.add(this.firstMissing + i)
    })
    this.waitMs = Math.min(this.waitMs * 2, this.limits.repeatMsMax)
    this.sinceMs = nowMs
  }

  /** A round trip, smoothed by eighths; what was repeated says nothing (Karn's rule). */
  #measure(nowMs: number): void {
    const sent = this.sentMs[0] ?? nowMs
    if (!this.sentAgain[0]) this.rttMs += (Math.max(1, nowMs - sent) - this.rttMs) / 8
  }
}

/** ACK after so many datagrams, or so long after the first of them. */
export const ACK_EVERY = 16
export const ACK_MS = 10

export class NumberedReceiver {
  firstMissing = 0
  /** Numbers beyond `firstMissing` that have arrived. */
  private readonly early = new Set<number>()
  private unsaid = 0
  private unsaidMs = Infinity
  private urgent = false
  readonly ahead: number

  /** @param ahead numbers that far beyond the first missing one are refused */
  constructor(ahead = 64) {
    this.ahead = ahead
  }

  /** False if it came before, or is further ahead than any sender may be. */
  take(number: number, nowMs: number): boolean {
    this.unsaid++
    if (this.unsaidMs === Infinity) this.unsaidMs = nowMs
    if (number < this.firstMissing || this.early.has(number)) {
      // Its ACK was lost.
      this.urgent = true
      return false
    }
    if (number > this.firstMissing + this.ahead) return false
    if (number > this.firstMissing) {
      this.early.add(number)
      this.urgent = true
      return true
    }
    this.firstMissing++
    while (this.early.delete(this.firstMissing)) this.firstMissing++
    return true
  }

  get bitmap(): bigint {
    let bits = 0n
    for (const number of this.early) bits |= 1n << BigInt(number - this.firstMissing - 1)
    return BigInt.asUintN(64, bits)
  }

  /** When an ACK is due; undefined if everything was said. */
  get ackMs(): number | undefined {
    if (this.unsaid === 0) return undefined
    return this.urgent || this.unsaid >= ACK_EVERY ? this.unsaidMs : this.unsaidMs + ACK_MS
  }

  /** The sender wants to hear whether somebody is there: an ACK is due at once. */
  asked(nowMs: number): void {
    this.unsaid = Math.max(1, this.unsaid)
    this.unsaidMs = Math.min(this.unsaidMs, nowMs)
    this.urgent = true
  }

  /** An ACK was sent. */
  said(): void {
    this.unsaid = 0
    this.unsaidMs = Infinity
    this.urgent = false
  }
}
