// Catches KV that is read where computing it again is sooner, or the other way round: with what one
// H100 and its host were measured to do, and with what an ordinary disk does.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Costs } from './costs.ts'

const PAGE = 2 << 20
/** An 8B model: 8,192 tokens are 512 pages of 16. */
const PAGES = 512
const TOKENS = 8192
/** What the tier of a GPU begins with: 25 GB/s. */
const GUESS = { save: 1 / 25e6, load: 1 / 25e6 }

/** After prompts were computed at 40,000 tokens a second, and tokens decoded at 150. */
function measured(guess = GUESS): Costs {
  const costs = new Costs(PAGE, guess)
  for (let i = 0; i < 20; i++) {
    costs.stepped({ promptTokens: 2048, decodes: 0 }, 51)
    costs.stepped({ promptTokens: 0, decodes: 1 }, 6.7)
  }
  return costs
}

test('a prompt in memory of the host is computed again, before or after the first reload', () => {
  const costs = measured()
  assert.ok(costs.preferLoading(PAGES, TOKENS))
  for (let i = 0; i < 20; i++) costs.moved('load', PAGES, 20)
  assert.ok(costs.preferLoading(PAGES, TOKENS))
  // A bus at a tenth of that takes as long as computing does.
  for (let i = 0; i < 200; i++) costs.moved('load', PAGES, 230)
  assert.ok(!costs.preferLoading(PAGES, TOKENS))
})

test('what lies on a disk beneath is taken for as near as memory, or memory for as far', () => {
  const costs = measured()
  for (let i = 0; i < 20; i++) {
    costs.moved('load', PAGES, 20)
    // 1.2 GB/s.
    costs.moved('fetch', PAGES, 895)
  }
  assert.ok(costs.preferLoading(PAGES, TOKENS, 0))
  assert.ok(!costs.preferLoading(PAGES, TOKENS, PAGES))
  // 100 pages from the disk take 175 ms and the others 16; 120 take 210.
  assert.ok(costs.preferLoading(PAGES, TOKENS, 100))
  assert.ok(!costs.preferLoading(PAGES, TOKENS, 120))
  for (let i = 0; i < 200; i++) costs.moved('fetch', PAGES, 153)
  assert.ok(costs.preferLoading(PAGES, TOKENS, PAGES), 'a disk of 7 GB/s is sooner')
})

test('a sequence on a GPU is computed again rather than moved', () => {
  const costs = measured()
  for (let i = 0; i < 20; i++) {
    costs.moved('save', PAGES, 20)
    costs.moved('load', PAGES, 20)
  }
  for (const tokens of [16, 100, TOKENS]) {
    assert.ok(costs.preferMoving(Math.ceil(tokens / 16), tokens, 0), `${tokens} tokens`)
  }
  assert.ok(costs.preferMoving(1, 0, 1), 'one token that was decoded takes longer than a page')
})

test('without a guess the first reload is expected of an ordinary disk', () => {
  const costs = new Costs(PAGE)
  assert.ok(costs.preferLoading(PAGES, TOKENS), 'nothing is known of computing either')
  for (let i = 0; i < 20; i++) costs.stepped({ promptTokens: 2048, decodes: 0 }, 51)
  assert.ok(!costs.preferLoading(PAGES, TOKENS))
})
