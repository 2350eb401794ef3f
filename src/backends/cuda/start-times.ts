// Owns how long each part of a start took: whoever waits for the first answer wants to know.

export class StartTimes {
  private readonly parts: { name: string; ms: number; note: string | undefined }[] = []
  private lastMs = performance.now()

  /** Everything since the last call was this part. */
  done(name: string, note?: string): void {
    const now = performance.now()
    this.parts.push({ name, ms: now - this.lastMs, note })
    this.lastMs = now
  }

  /** Such as "kernels 1.2 s (21 compiled), weights 0.4 s". */
  toString(): string {
    return this.parts
      .map(({ name, ms, note }) => {
        const extra = note === undefined ? '' : ` (${note})`
        return `${name} ${(ms / 1000).toFixed(2)} s${extra}`
      })
      .join(', ')
  }
}
