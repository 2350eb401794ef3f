// Owns whose turn it is: those to whom something happened, and those who wanted to be asked at a
// time, the earliest first. So that many who only wait cost nothing.

export interface Turned {
  /** The earliest time at which it is in the queue; Infinity if it is not. Theirs to set. */
  queuedMs: number
  /** It is among those to whom something happened. Theirs to set. */
  isTouched: boolean
}

export class Turns<T extends Turned> {
  private touched: T[] = []
  private spare: T[] = []
  /** A binary heap by time. One that was queued again for earlier is in it twice. */
  private readonly times: number[] = []
  private readonly queued: T[] = []

  /** Something happened to it: it is among the next. */
  touch(one: T): void {
    if (one.isTouched) return
    one.isTouched = true
    this.touched.push(one)
  }

  /**
   * Lets everyone who is due have a turn.
   * @param turn returns when it wants the next one; undefined if never again
   * @returns when somebody wants one, undefined if nobody
   */
  run(nowMs: number, turn: (one: T) => number | undefined): number | undefined {
    for (let at = this.times[0]; at !== undefined && at <= nowMs; at = this.times[0]) {
      const one = this.pop()
      if (one.queuedMs <= at) one.queuedMs = Infinity
      this.touch(one)
    }
    const due = this.touched
    this.touched = this.spare
    for (const one of due) {
      one.isTouched = false
      const next = turn(one)
      if (next !== undefined && next < one.queuedMs) this.push(next, one)
    }
    due.length = 0
    this.spare = due
    return this.touched.length > 0 ? nowMs : this.times[0]
  }

  private push(at: number, one: T): void {
    const { times, queued } = this
    one.queuedMs = at
    let i = times.length
    for (; i > 0;) {
      const parent = (i - 1) >> 1
      if (times[parent]! <= at) break
      times[i] = times[parent]!
      queued[i] = queued[parent]!
      i = parent
    }
    times[i] = at
    queued[i] = one
  }

  private pop(): T {
    const { times, queued } = this
    const first = queued[0]!
    const at = times.pop()!
    const one = queued.pop()!
    const count = times.length
    if (count === 0) return first
    let i = 0
    for (;;) {
      let child = 2 * i + 1
      if (child >= count) break
      if (child + 1 < count && times[child + 1]! < times[child]!) child++
      if (times[child]! >= at) break
      times[i] = times[child]!
      queued[i] = queued[child]!
      i = child
    }
    times[i] = at
    queued[i] = one
    return first
  }
}
