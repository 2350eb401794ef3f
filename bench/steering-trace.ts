// Owns the trace that steering is measured with: chats of several turns, five system prompts among
// them, some forty chats open at a time.

import type { Random } from '../test/support/random.ts'

export interface Turn {
  chat: number
  prompt: Uint8Array
}

/** Chats that go on at the same time. */
const OPEN = 40

/** Every turn of a chat is its prompt so far and an answer and a question more. */
export function makeTrace(chats: number, random: Random): Turn[] {
  const text = (least: number, most: number): Uint8Array =>
    Uint8Array.from({ length: least + random.below(most - least) }, () => 97 + random.below(26))
  const systems = Array.from({ length: 5 }, () => text(1500, 6000))
  const open = Array.from({ length: chats }, (_, chat) => ({
    chat,
    prompt: systems[random.below(systems.length)]!,
    turns: 2 + random.below(8),
  }))
  const turns: Turn[] = []
  let active = open.splice(0, OPEN)
  while (active.length > 0) {
    const chat = active[random.below(active.length)]!
    chat.prompt = Buffer.concat([chat.prompt, text(300, 3500)])
    turns.push({ chat: chat.chat, prompt: chat.prompt })
    if (--chat.turns > 0) continue
    active = active.filter((other) => other !== chat)
    active.push(...open.splice(0, 1))
  }
  return turns
}

/** What a cache of each replica holds: a quarter of what the last turns of all chats touch. */
export function cacheBytes(chats: number): number {
  return (chats * 12_000) / 4
}
