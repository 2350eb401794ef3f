// Every family against transformers' logits, in every shape a step can have. KV memory is full of
// NaN before anything is written, so a key read too early, too late or from the wrong slot shows.

import assert from 'node:assert/strict'
import { after, describe, test } from 'node:test'
import { FAMILIES, Golden } from './golden.ts'
import { Stepper, type StepperOptions } from './stepper.ts'
import { Random } from '../support/random.ts'
import { pagesFor } from '../../src/kv/layout.ts'

const worst: Record<string, string> = {}
after(() => console.log('largest relative error:', worst))

for (const family of FAMILIES) {
  describe(family, () => {
    const golden = new Golden(family)
    let largest = 0
    after(() => void (worst[family] = largest.toExponential(1)))

    function stepping(options: StepperOptions, run: (stepper: Stepper) => void): void {
      using stepper = new Stepper(golden, options)
      run(stepper)
      largest = Math.max(largest, stepper.worst)
    }

    test('wrong when a whole prompt is one step', () => {
      stepping({}, (s) => {
        for (const sequence of [0, 1, 2]) {
          s.hold(sequence, sequence)
          s.finish(sequence, Infinity)
        }
      })
    })

    test('wrong when a prompt comes in odd chunks', () => {
      stepping({ stepTokens: 129 }, (s) => {
        s.hold(3, 0)
        s.finish(3, 1, 7, 64, 3, 65, 2, 129)
        s.hold(0, 1)
        s.finish(0, 23, 5)
      })
    })

    test('wrong when tokens come one by one', () => {
      stepping({ stepTokens: 640 }, (s) => {
        s.hold(5, 2)
        s.finish(5, 1)
        s.hold(2, 0)
        s.step({ slot: 2, count: s.left(2) - 40 })
        s.finish(2, 1)
      })
    })

    test('wrong when sequences of one length in evenly spaced slots decode together', () => {
      stepping({}, (s) => decodeTogether(s, [1, 3, 5, 7], [20, 20, 20, 20]))
    })

    test('wrong when sequences of near lengths in evenly spaced slots decode together', () => {
      stepping({}, (s) => decodeTogether(s, [0, 2, 4, 6], [30, 17, 41, 24]))
    })

    test('wrong when sequences in scattered slots decode together', () => {
      stepping({}, (s) => decodeTogether(s, [6, 0, 1, 5, 2], [12, 40, 3, 19, 40]))
    })

    test('wrong when a long and a short sequence decode together', () => {
      stepping({}, (s) => {
        const long = golden.sequence(0).tokens.length - 30
        s.hold(2, 0)
        s.step({ slot: 2, count: long })
        s.hold(3, 2)
        s.hold(4, 1)
        for (let i = 0; i < 30; i++) s.step(...[2, 3, 4].map((slot) => ({ slot, count: 1 })))
      })
    })

    test('wrong when chunks and single tokens share a step, with and without logits', () => {
      stepping({ stepTokens: 100 }, (s) => {
        decodeTogether(s, [0, 2, 4], [30, 30, 11], 4)
        s.hold(1, 0)
        s.hold(3, 1)
        for (let i = 0; i < 6; i++) {
          s.step(
            { slot: 0, count: 1 },
            { slot: 1, count: 17, wants: i % 2 === 1 },
            { slot: 2, count: 1 },
            { slot: 3, count: 3, wants: i % 3 === 1 },
            { slot: 4, count: 1 },
          )
        }
        s.step({ slot: 1, count: 2, wants: false }, { slot: 3, count: 5, wants: false })
        s.step({ slot: 1, count: 1, wants: false })
        s.step({ slot: 3, count: 1 }, { slot: 1, count: 40 })
      })
    })

    test('keys of the sequence that had the slot before, released or not', () => {
      stepping({}, (s) => {
        s.hold(2, 0)
        s.finish(2, Infinity)
        s.release(2)
        s.hold(2, 1)
        s.step({ slot: 2, count: 30 })
        s.finish(2, 8)
        s.hold(2, 2) // not released: a warm slot is written over
        s.finish(2, 5, 1)
        s.hold(2, 0)
        s.step({ slot: 2, count: 64 })
        decodeTogether(s, [1, 3], [20, 25], 5)
      })
    })

    test('pages touched past the tokens that are there', () => {
      stepping({}, (s) => {
        const { kv } = s.backend
        for (let slot = 0; slot < kv.slots; slot++) s.release(slot)
        decodeTogether(s, [1, 3, 5, 7], [20, 2, 33, 9], 10)
        const tokens = [30, 12, 43, 19]
        const pages = tokens.reduce((sum, count) => sum + pagesFor(kv.layout, count), 0)
        assert.equal(kv.residentBytes(), pages * kv.layout.shape.pageBytes)
      })
    })

    test('wrong when sequences come, go and share steps at random', () => {
      const seed = FAMILIES.indexOf(family) + 77
      const random = new Random(seed)
      stepping({ slots: 6, stepTokens: 90 }, (s) => {
        for (let i = 0; i < 120; i++) randomStep(s, random)
      })
    })
  })
}

// Two threads wait for each other at every node: few steps, so that a busy machine gets there.
test('wrong when two threads share the work', () => {
  const golden = new Golden('llama2')
  using s = new Stepper(golden, { threads: 2 })
  s.hold(0, 0)
  s.step({ slot: 0, count: s.left(0) - 1 })
  s.step({ slot: 0, count: 1 })
  decodeTogether(s, [0, 2, 1], [30, 32, 9], 2)
})

/** Prefills a sequence to each length, then decodes all of them a token a step. */
function decodeTogether(s: Stepper, slots: number[], lengths: number[], steps = 25): void {
  slots.forEach((slot, i) => {
    s.hold(slot, 1)
    s.step({ slot, count: lengths[i]! })
  })
  for (let i = 0; i < steps; i++) s.step(...slots.map((slot) => ({ slot, count: 1 })))
}

/** Some slots in some order: each starts, goes on by one or by a chunk, or gives way. */
function randomStep(s: Stepper, random: Random): void {
  const order = [0, 1, 2, 3, 4, 5].filter(() => random.next() < 0.7)
  if (random.next() < 0.4) order.sort(() => random.next() - 0.5)
  let budget = 90
  const parts = order.flatMap((slot) => {
    const ended = !s.holds(slot) || s.left(slot) === 0
    if (ended || random.next() < 0.02) {
      if (s.holds(slot) && random.next() < 0.5) s.release(slot)
      s.hold(slot, random.below(3))
    }
    const chunk = random.next() < 0.25 ? 1 + random.below(80) : 1
    const count = Math.min(chunk, s.left(slot), budget)
    budget -= count
    return count === 0 ? [] : [{ slot, count, wants: random.next() < 0.8 }]
  })
  if (parts.length > 0) s.step(...parts)
}
