// Owns calls of functions in a child process, by name, over Node's channel between the two.

import type { ChildProcess } from 'node:child_process'

interface Call {
  id: number
  command: string
  args: unknown[]
}

interface Reply {
  id: number
  value?: unknown
  error?: string
}

/** What a child can be asked for. */
type Commands = Readonly<Record<string, (...args: never[]) => unknown>>

/** The parent's side. */
export class RemoteCalls<C extends Commands> {
  private readonly child: ChildProcess
  private readonly calls = new Map<number, PromiseWithResolvers<unknown>>()
  private nextId = 1

  /** @param name of the child, for those who wait for it when it ends */
  constructor(child: ChildProcess, name: string) {
    this.child = child
    child.on('message', ({ id, value, error }: Reply) => {
      const call = this.calls.get(id)
      this.calls.delete(id)
      if (error === undefined) call?.resolve(value)
      else call?.reject(new Error(error))
    })
    child.on('exit', () => {
      for (const call of this.calls.values()) call.reject(new Error(`${name} has ended`))
    })
  }

  /** Has the child do something; what it throws is thrown here. */
  call<N extends keyof C & string>(
    command: N,
    ...args: Parameters<C[N]>
  ): Promise<Awaited<ReturnType<C[N]>>> {
    const id = this.nextId++
    const call = Promise.withResolvers<unknown>()
    this.calls.set(id, call)
    this.child.send({ id, command, args } satisfies Call)
    return call.promise as Promise<Awaited<ReturnType<C[N]>>>
  }
}

/** The child's side: answers until its parent has gone, then ends. */
export function answerCalls(commands: Commands): void {
  process.on('message', async ({ id, command, args }: Call) => {
    const reply = (what: Omit<Reply, 'id'>) => process.send?.({ id, ...what } satisfies Reply)
    try {
      reply({ value: await (commands[command] as (...all: unknown[]) => unknown)(...args) })
    } catch (thrown) {
      reply({ error: thrown instanceof Error ? (thrown.stack ?? thrown.message) : String(thrown) })
    }
  })
  process.on('disconnect', () => process.exit())
}
