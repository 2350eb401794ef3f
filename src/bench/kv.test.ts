// Catches a comparison of memory managers in which one cheats: holds less than there is, keeps what
// has ended, finds what nobody had, or gets another trace.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { replay, runKvBench } from './kv.ts'
import { BlocksModel } from './kv-blocks.ts'
import { LatticeModel } from './kv-lattice.ts'
import { type KvModel, StaticModel, TOKEN_BYTES, TokensModel } from './kv-model.ts'
import { type KvAct, kvTrace } from './kv-trace.ts'

/** Hands on every act, and looks at what is held after each. */
class Watched implements KvModel {
  private readonly tokens = new TokensModel()
  private readonly model: KvModel

  constructor(model: KvModel) {
    this.model = model
  }

  get copiedBytes(): number {
    return this.model.copiedBytes
  }

  begin(id: number, prompt: Int32Array): number {
    this.tokens.begin(id, prompt)
    return this.look(this.model.begin(id, prompt))
  }

  append(id: number, token: number): void {
    this.tokens.append(id, token)
    this.look(this.model.append(id, token))
  }

  fork(id: number, from: number): void {
    this.tokens.fork(id, from)
    this.look(this.model.fork(id, from))
  }

  end(id: number): void {
    this.tokens.end(id)
    this.look(this.model.end(id))
  }

  heldBytes(): number {
    return this.model.heldBytes()
  }

  private look<T>(result: T): T {
    assert.ok(this.model.heldBytes() >= this.tokens.heldBytes(), 'less than the tokens there are')
    return result
  }
}

test('a manager holds less than there is, or keeps what has ended', () => {
  for (const work of kvTrace(3)) {
    for (const model of [new StaticModel(), new BlocksModel(8000), new LatticeModel(8000)]) {
      const { waste, foundTokens, promptTokens } = replay(work, new Watched(model))
      assert.equal(model.heldBytes(), 0, work.name)
      assert.ok(waste >= 0 && waste < 1)
      assert.ok(foundTokens < promptTokens)
    }
  }
})

test('the same seed gives another trace, or every seed the same', () => {
  const [one, two] = [1, 2].map((seed) => runKvBench({ seed, cachedTokens: 20_000 }))
  assert.deepEqual(runKvBench({ seed: 1, cachedTokens: 20_000 }), one)
  assert.notDeepEqual(one, two)
})

test('tokens that sequences share are counted twice, or blocks are not as in the paper', () => {
  const prompt = Int32Array.from({ length: 40 }, (_, i) => i)
  const acts: KvAct[] = [
    { kind: 'begin', id: 0, prompt },
    { kind: 'fork', id: 1, from: 0 },
    { kind: 'append', id: 0, token: 100 },
    { kind: 'append', id: 1, token: 101 },
    { kind: 'begin', id: 2, prompt: Int32Array.of(...prompt, 7) },
  ]
  const tokens = new TokensModel()
  const blocks = new BlocksModel(1000)
  const steps = [acts]
  const { foundTokens } = replay({ name: '', steps }, blocks)
  replay({ name: '', steps }, tokens)
  assert.equal(tokens.heldBytes(), 43 * TOKEN_BYTES)
  // Two full blocks for all three, and a third for each; eight tokens were copied when the parent
  // wrote first; the child's block is then its own.
  assert.equal(blocks.heldBytes(), 5 * 16 * TOKEN_BYTES)
  assert.equal(blocks.copiedBytes, 8 * TOKEN_BYTES)
  assert.equal(foundTokens, 32)
})
