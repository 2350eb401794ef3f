// Owns leaving the terminal as it was found, and keeping a model's words from commanding it.

/**
 * Writes `enter` now and `leave` when the returned function is called, or when the process ends by
 * itself, by an error or by a signal: whichever comes first.
 */
export function borrowTerminal(enter: string, leave: string): () => void {
  let borrowed = true
  const restore = (): void => {
    if (!borrowed) return
    borrowed = false
    process.off('exit', restore)
    process.off('SIGTERM', terminated)
    process.off('SIGHUP', hungUp)
    process.stdout.write(leave)
  }
  const terminated = (): never => process.exit(143)
  const hungUp = (): never => process.exit(129)
  process.on('exit', restore)
  process.on('SIGTERM', terminated)
  process.on('SIGHUP', hungUp)
  process.stdout.write(enter)
  return restore
}

/** Makes control characters visible but newline and tab: a model that says ESC prints ␛. */
export function printable(text: string): string {
  // oxlint-disable-next-line no-control-regex
  return text.replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f]/g, (character) => {
    const code = character.charCodeAt(0)
    if (code < 0x20) return String.fromCharCode(0x2400 + code)
    return code === 0x7f ? '␡' : '�'
  })
}

/** A writer to stdout: text as it is into a file or pipe, made printable for a terminal. */
export function stdoutWriter(): (text: string) => void {
  if (!process.stdout.isTTY) return (text) => void process.stdout.write(text)
  return (text) => void process.stdout.write(printable(text))
}

/**
 * Runs `work` with a signal that Ctrl-C aborts. A second Ctrl-C ends the process at once, should
 * the work not stop.
 */
export async function interruptible<T>(work: (interrupt: AbortSignal) => Promise<T>): Promise<T> {
  const controller = new AbortController()
  const onInterrupt = (): void => controller.abort()
  process.once('SIGINT', onInterrupt)
  try {
    return await work(controller.signal)
  } finally {
    process.off('SIGINT', onInterrupt)
  }
}
