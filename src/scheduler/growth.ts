// Owns how much memory sequences are expected to need before they end: who is let in beyond that
// would throw out others, or be thrown out. After Past-Future scheduling (Gong et al. 2025).

/** Output tokens that a sequence is expected to have before any has ended. */
const OUTPUT_TOKENS_EXPECTED = 128

/** How much the newest sequence's length counts against all before it. */
const NEWEST = 1 / 16

/** How long outputs are: what one goes on for is what all went on for, whatever it has already. */
export class OutputLengths {
  private mean = OUTPUT_TOKENS_EXPECTED

  ended(outputTokens: number): void {
    if (outputTokens > 0) this.mean += (outputTokens - this.mean) * NEWEST
  }

  /**
   * Tokens that a sequence is expected to go on for.
   * @param most that it may go on for
   * @param preemptions that it had already: each doubles what is set aside, so that it ends
   */
  remaining(most: number, preemptions: number): number {
    return Math.min(most, Math.ceil(this.mean) * 2 ** preemptions)
  }
}

export interface Growing {
  /** Of its own, now. */
  pages: number
  /** Tokens until it ends and gives all of them back. */
  remaining: number
}

/** The most pages that sequences have at one time if all gain a token a step. */
export function peakPages(list: Growing[], pagesPerToken: number, roundingPages: number): number {
  // The peaks are just before one of them ends, when those that outlive it have grown as far.
  list.sort((a, b) => b.remaining - a.remaining)
  let pages = 0
  let peak = 0
  list.forEach((growing, i) => {
    pages += growing.pages + roundingPages
    peak = Math.max(peak, pages + (i + 1) * growing.remaining * pagesPerToken)
  })
  return peak
}
