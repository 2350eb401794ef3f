// Owns the trace that memory managers are compared on: five kinds of work, as prompts, tokens,
// forks and ends, step by step. Seeded; the same for every manager.

import { RandomStream } from '../engine/sampler-random.ts'

/** What happens to sequences; each has an id that is never used again. */
export type KvAct =
  | { kind: 'begin'; id: number; prompt: Int32Array }
  /** A token is decoded. */
  | { kind: 'append'; id: number; token: number }
  /** A sequence begins with all that another has. */
  | { kind: 'fork'; id: number; from: number }
  | { kind: 'end'; id: number }

/** One kind of work; `steps` are lists of acts, one list a step of the engine. */
export interface KvWork {
  name: string
  steps: KvAct[][]
}

/** Longest sequence of the trace, with room to spare. */
export const TRACE_CONTEXT = 2048

/** Prompts, outputs and who shares what with whom. */
export function kvTrace(seed: number): KvWork[] {
  const random = new RandomStream(seed)
  let [nextId, nextToken] = [0, 0]
  const between = (low: number, high: number): number =>
    low + Math.floor(random.uniform() * (high - low))
  /** Tokens that occur nowhere else. */
  const text = (length: number): Int32Array => Int32Array.from({ length }, () => nextToken++)
  const join = (...parts: Int32Array[]): Int32Array =>
    Int32Array.from(parts.flatMap((part) => [...part]))

  /** Requests that start some steps apart, decode so many tokens and end. */
  const requests = (list: readonly { at: number; prompt: Int32Array; output: number }[]) => {
    const steps: KvAct[][] = []
    for (const { at, prompt, output } of list) {
      const id = nextId++
      put(steps, at, { kind: 'begin', id, prompt })
      for (let i = 1; i <= output; i++) {
        put(steps, at + i, { kind: 'append', id, token: nextToken++ })
      }
      put(steps, at + output + 1, { kind: 'end', id })
    }
    return steps
  }

  const chats = Array.from({ length: 60 }, (_, i) => {
    const first = { at: i * 4, prompt: text(between(20, 200)), output: between(20, 150) }
    // The second turn repeats the first's prompt; its answer counts as new tokens here.
    const prompt = join(first.prompt, text(first.output), text(between(10, 60)))
    return [first, { at: first.at + first.output + 40, prompt, output: between(20, 150) }]
  }).flat()

  const documents = Array.from({ length: 5 }, (_, i) => {
    const document = text(between(1200, 1700))
    return [0, 1].map((asked) => ({
      at: i * 60 + asked * 130,
      prompt: join(document, text(between(15, 60))),
      output: between(30, 80),
    }))
  }).flat()

  const system = text(700)
  const assistants = Array.from({ length: 48 }, (_, i) => ({
    at: i * 3,
    prompt: join(system, text(between(20, 100))),
    output: between(30, 100),
  }))

  /** Every step each survivor gains a token; a beam's next step comes from a parent at random. */
  const beams = (width: number, promptTokens: number, output: number): KvAct[][] => {
    const steps: KvAct[][] = []
    let alive = [nextId++]
    put(steps, 0, { kind: 'begin', id: alive[0] ?? 0, prompt: text(promptTokens) })
    for (let step = 1; step <= output; step++) {
      // The best beam has most of the children, as scores would have it.
      const parents = Array.from({ length: width }, () =>
        Math.min(between(0, alive.length), between(0, alive.length)),
      )
      const next: number[] = []
      alive.forEach((id, rank) => {
        const children = parents.filter((parent) => parent === rank).length
        if (children === 0) return put(steps, step, { kind: 'end', id })
        next.push(id)
        for (let child = 1; child < children; child++) {
          next.push(nextId)
          put(steps, step, { kind: 'fork', id: nextId++, from: id })
        }
      })
      // Ends come after forks, so that no parent is gone before its children are there.
      steps[step]?.sort((a, b) => order(a) - order(b))
      for (const id of next) put(steps, step, { kind: 'append', id, token: nextToken++ })
      alive = next
    }
    for (const id of alive) put(steps, output + 1, { kind: 'end', id })
    return steps
  }

  /** A root that three times splits in four; each of the 64 leaves goes on alone. */
  const tree = (): KvAct[][] => {
    const steps: KvAct[][] = []
    let alive = [nextId++]
    let at = 0
    put(steps, 0, { kind: 'begin', id: alive[0] ?? 0, prompt: text(800) })
    for (let level = 0; level < 4; level++) {
      for (let i = 0; i < 40; i++) {
        at++
        for (const id of alive) put(steps, at, { kind: 'append', id, token: nextToken++ })
      }
      at++
      if (level === 3) break
      alive = alive.flatMap((from) => {
        const children = [nextId++, nextId++, nextId++]
        for (const id of children) put(steps, at, { kind: 'fork', id, from })
        return [from, ...children]
      })
    }
    for (const id of alive) put(steps, at, { kind: 'end', id })
    return steps
  }

  const works: KvWork[] = [
    { name: 'short chats', steps: requests(chats) },
    { name: 'long documents', steps: requests(documents) },
    { name: 'shared system prompt', steps: requests(assistants) },
    { name: 'beam search, width 4', steps: beams(4, 512, 128) },
    { name: 'agent tree of 64 branches', steps: tree() },
  ]
  const longest = Math.max(...works.map(({ steps }) => steps.length))
  const together = Array.from({ length: longest }, (_, step) =>
    works.flatMap(({ steps }) => steps[step] ?? []),
  )
  return [...works, { name: 'all together', steps: together }]
}

function put(steps: KvAct[][], at: number, act: KvAct): void {
  while (steps.length <= at) steps.push([])
  steps[at]?.push(act)
}

function order({ kind }: KvAct): number {
  return kind === 'fork' ? 0 : 1
}
