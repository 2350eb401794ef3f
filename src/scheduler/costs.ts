// Owns what it takes to bring a preempted sequence back: computing it again, or writing and reading
// its pages. Measured as the engine goes; until then it is an ordinary disk and a small model.

/** Before the first measurement. */
const PREFILL_TOKEN_MS = 2
const DECODE_TOKEN_MS = 10
const SAVE_BYTE_MS = 1 / (1000 * 1000)
const LOAD_BYTE_MS = 1 / (2000 * 1000)

/** Moving leaves the processors to those that run: its time counts for less. */
const MOVING_WEIGHT = 0.25

/** What is older counts less by this, each time. */
const DECAY = 0.9

/** Time over amount, of late. */
class Rate {
  private ms: number
  private amount = 1

  constructor(ms: number) {
    this.ms = ms
  }

  add(ms: number, amount: number): void {
    // A clock that stands still measures nothing.
    if (amount <= 0 || ms <= 0) return
    this.ms = this.ms * DECAY + ms
    this.amount = this.amount * DECAY + amount
  }

  get(): number {
    return this.ms / this.amount
  }
}

/** What a step computes. */
export interface StepWork {
  promptTokens: number
  decodes: number
}

export class Costs {
  private readonly prefillTokenMs = new Rate(PREFILL_TOKEN_MS)
  private readonly decodeTokenMs = new Rate(DECODE_TOKEN_MS)
  /** fetch: what comes from a disk beneath memory of the host. */
  private readonly pageMs: Readonly<Record<'save' | 'load' | 'fetch', Rate>>

  /** @param guess milliseconds a byte, where columns do not go to a disk at once */
  constructor(pageBytes: number, guess = { save: SAVE_BYTE_MS, load: LOAD_BYTE_MS }) {
    this.pageMs = {
      save: new Rate(guess.save * pageBytes),
      load: new Rate(guess.load * pageBytes),
      fetch: new Rate(LOAD_BYTE_MS * pageBytes),
    }
  }

  /** A step took this long. */
  stepped({ promptTokens, decodes }: StepWork, ms: number): void {
    if (promptTokens === 0) this.decodeTokenMs.add(ms, decodes)
    // With few decodes beside them, prompts are what the time went to.
    else if (promptTokens > 4 * decodes) this.prefillTokenMs.add(ms, promptTokens + decodes)
  }

  moved(kind: 'save' | 'load' | 'fetch', pages: number, ms: number): void {
    this.pageMs[kind].add(ms, pages)
  }

  /**
   * Whether pages are read sooner than so many tokens of a prompt are computed again.
   * @param below of the pages, those that come from a disk beneath memory of the host
   */
  preferLoading(pages: number, promptTokens: number, below = 0): boolean {
    const { load, fetch } = this.pageMs
    const loading = (pages - below) * load.get() + below * fetch.get()
    return loading <= promptTokens * this.prefillTokenMs.get()
  }

  /** Whether pages are written and read sooner than so many tokens are computed again. */
  preferMoving(pages: number, promptTokens: number, outputTokens: number): boolean {
    const moving = pages * (this.pageMs.save.get() + this.pageMs.load.get())
    const prefill = promptTokens * this.prefillTokenMs.get()
    return MOVING_WEIGHT * moving <= prefill + outputTokens * this.decodeTokenMs.get()
  }
}
