// Catches a program that sends the next turn of a chat elsewhere than where the last one was.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { replay } from '../../bench/steering-processes.ts'
import { makeTrace } from '../../bench/steering-trace.ts'
import { Random } from '../support/random.ts'
import { WITHOUT_ROOT } from './namespaces.ts'

const [PROCESSES, CHATS, SEED] = [3, 5, 7]

test(
  'chats over several engine processes hit no more than in turn',
  {
    skip: WITHOUT_ROOT,
  },
  async (t) => {
    const trace = makeTrace(CHATS, new Random(SEED))
    const rates: number[] = []
    for (const chooser of ['program', 'round robin'] as const) {
      const { hits, queries, told, requests } = await replay(PROCESSES, CHATS, trace, chooser)
      t.diagnostic(`${chooser}: ${hits} of ${queries} tokens`)
      assert.equal(requests, trace.length)
      assert.equal(told, hits, 'clients are told of other hits than engines count')
      rates.push(hits / queries)
    }
    const [program = 0, inTurn = 0] = rates
    // 0.75 and 0.40 when this was written.
    assert.ok(program > inTurn + 0.15, `${program} against ${inTurn}`)
  },
)
