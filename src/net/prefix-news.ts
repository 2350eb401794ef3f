// Owns the truth about prefixes: which first bytes of prompts an engine has in memory. What was
// computed is published when the engine says that it is cached, and withdrawn soon after it is not.

import type { Engine } from '../engine/api.ts'
import type { WireRequest } from './exchange.ts'
import { allPrefixHashes, PREFIX_LADDER } from './protocol.ts'
import { type SipKey, sipKey } from './siphash.ts'

/** Whose prompts they are; the first key is what their hashes are made with. */
export interface PrefixTenant {
  index: number
  keys: readonly [Uint8Array, Uint8Array]
}

/** A prefix that is gone is still preferred for so long: a wrong guess, never a wrong answer. */
const POLL_MS = 500
/** Of one engine, at once: a sixteenth of what the program's map holds. */
const PREFIXES_MAX = 16_384

export class PrefixNews {
  private readonly engine: Engine
  private readonly keys: ReadonlyMap<number, SipKey>
  private readonly publish: (hash: bigint, isHeld: boolean) => void
  /** What is published, or about to be if the engine has it. */
  private readonly known = new Set<bigint>()
  private timer: NodeJS.Timeout | undefined

  constructor(
    engine: Engine,
    tenants: readonly PrefixTenant[],
    publish: (hash: bigint, isHeld: boolean) => void,
  ) {
    this.engine = engine
    this.keys = new Map(tenants.map(({ index, keys }) => [index, sipKey(keys[0])]))
    this.publish = publish
  }

  /** Publishes what is known to be cached; what went meanwhile is withdrawn at the first look. */
  begin(): void {
    for (const hash of this.known) this.publish(hash, true)
    this.timer = setInterval(() => void this.poll(), POLL_MS)
    this.timer.unref()
  }

  end(): void {
    clearInterval(this.timer)
  }

  /** A prompt is in memory, so its prefixes may be cached. */
  readonly computed = (
    { tenant: index, prompt }: WireRequest,
    tokens: Int32Array,
    tenant: string,
  ): void => {
    const key = this.keys.get(index)
    if (!key || prompt.length < PREFIX_LADDER[0]) return
    const lengths = PREFIX_LADDER.filter((bytes) => bytes <= prompt.length)
    const prefixes = allPrefixHashes(key, prompt, lengths).flatMap((hash, i) => {
      const bytes = lengths[i] ?? 0
      if (this.known.size >= PREFIXES_MAX || this.known.has(hash)) return []
      this.known.add(hash)
      // Where in the tokens the bytes end is known as well as one part of a text is like another.
      const length = Math.ceil((tokens.length * bytes) / prompt.length)
      return [{ id: String(hash), length }]
    })
    if (prefixes.length > 0) void this.watch(tenant, tokens, prefixes)
  }

  private async watch(
    tenant: string,
    tokens: Int32Array,
    prefixes: { id: string; length: number }[],
  ): Promise<void> {
    const cached = await this.ask({ kind: 'watch', tenant, tokens, prefixes })
    for (const { id } of prefixes) {
      const isCached = cached.includes(id)
      if (!isCached) this.known.delete(BigInt(id))
      this.publish(BigInt(id), isCached)
    }
  }

  private async poll(): Promise<void> {
    if (this.known.size === 0) return
    for (const id of await this.ask({ kind: 'forgotten' })) {
      this.known.delete(BigInt(id))
      this.publish(BigInt(id), false)
    }
  }

  /** An engine that has stopped holds nothing; whoever waits for its answers is told elsewhere. */
  private async ask(
    question: Parameters<Engine['ask']>[0] & { kind: 'watch' | 'forgotten' },
  ): Promise<string[]> {
    return (await this.engine.ask(question).catch(() => [])) as string[]
  }
}
