// Owns reading what a person types: one message at a time, with history, pasted lines kept
// together. Between two reads the terminal is in its normal mode, so Ctrl-C is a plain signal.

import { createInterface, type Interface } from 'node:readline'
import { borrowTerminal } from './terminal.ts'

/** A line; Ctrl-C, which discards what was typed, if anything was; or the end of the input. */
export type Typed =
  | { kind: 'line'; text: string }
  | { kind: 'interrupt'; discarded: boolean }
  | { kind: 'end' }

const BRACKETED_PASTE_ON = '\x1b[?2004h'
const BRACKETED_PASTE_OFF = '\x1b[?2004l'
const HISTORY_LINES = 500

export class LineReader {
  #history: string[] = []
  #piped: AsyncIterator<string> | undefined

  /** @param prompt shown to a person, not to a pipe. */
  async read(prompt: string): Promise<Typed> {
    if (process.stdin.isTTY && process.stdout.isTTY) return this.#ask(prompt)
    this.#piped ??= createInterface({ input: process.stdin })[Symbol.asyncIterator]()
    const { value, done } = await this.#piped.next()
    return done ? { kind: 'end' } : { kind: 'line', text: value }
  }

  async #ask(prompt: string): Promise<Typed> {
    const restore = borrowTerminal(BRACKETED_PASTE_ON, BRACKETED_PASTE_OFF)
    const editor = createInterface({
      input: process.stdin,
      output: process.stdout,
      terminal: true,
      prompt,
      history: [...this.#history],
      historySize: HISTORY_LINES,
      removeHistoryDuplicates: true,
    })
    editor.on('history', (lines: string[]) => (this.#history = [...lines]))
    try {
      return await typed(editor)
    } finally {
      editor.close()
      restore()
    }
  }
}

function typed(editor: Interface): Promise<Typed> {
  return new Promise((resolve) => {
    const lines: string[] = []
    let pasting = false
    const onKey = (_text: string | undefined, key: { name?: string } | undefined): void => {
      if (key?.name === 'paste-start') pasting = true
      if (key?.name === 'paste-end') pasting = false
    }
    const finish = (result: Typed): void => {
      process.stdin.off('keypress', onKey)
      resolve(result)
    }
    process.stdin.on('keypress', onKey)
    editor.on('line', (line) => {
      lines.push(line)
      if (!pasting) finish({ kind: 'line', text: lines.join('\n') })
    })
    editor.on('SIGINT', () => {
      const discarded = editor.line !== '' || lines.length > 0
      process.stdout.write('^C\n')
      finish({ kind: 'interrupt', discarded })
    })
    editor.on('close', () => finish({ kind: 'end' }))
    editor.prompt()
  })
}
