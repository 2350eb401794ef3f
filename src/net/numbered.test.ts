// Catches datagrams that are lost for good, delivered twice or out of order over a network that
// loses, repeats, delays and swaps them, and senders that flood it.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Random } from '../../test/support/random.ts'
import { NumberedReceiver, NumberedSender } from './numbered.ts'

interface World {
  loss: number
  repeats: number
  delayMs: number
  jitterMs: number
}

/** Sends `total` datagrams through a network; returns how many transmissions that took. */
function transfer(seed: number, total: number, world: World): { sent: number; ms: number } {
  const random = new Random(seed)
  const [sender, receiver] = [new NumberedSender(), new NumberedReceiver()]
  const events: { at: number; act: () => void }[] = []
  let [now, sent] = [0, 0]
  const travel = (act: () => void) => {
    const copies = random.next() < world.loss ? 0 : random.next() < world.repeats ? 2 : 1
    for (let i = 0; i < copies; i++) {
      events.push({ at: now + world.delayMs + random.next() * world.jitterMs, act })
    }
  }
  const got: number[] = []
  const acknowledge = () => {
    const { firstMissing, bitmap } = receiver
    travel(() => sender.acknowledge(firstMissing, bitmap, 64, now))
    receiver.said()
  }
  sender.extend(total)
  while (!sender.done) {
    assert.ok(!sender.failed && now < 600_000, `it gave up at ${now} ms`)
    for (const number of sender.due(now)) {
      sent++
      assert.ok(number <= sender.firstMissing + 64, 'it sends beyond its window')
      travel(() => {
        if (receiver.take(number, now)) got.push(number)
      })
    }
    if (receiver.ackMs !== undefined && receiver.ackMs <= now) acknowledge()
    const times = [sender.nextMs(), receiver.ackMs, ...events.map(({ at }) => at)]
    const next = Math.min(...times.filter((at) => at !== undefined && at > now).map(Number))
    now = next === Infinity ? now + 1 : next
    for (const event of events.filter(({ at }) => at <= now)) {
      events.splice(events.indexOf(event), 1)
      event.act()
    }
  }
  assert.equal(new Set(got).size, got.length, 'a datagram is delivered twice')
  assert.equal(got.length, total)
  assert.equal(receiver.firstMissing, total)
  return { sent, ms: now }
}

test('a network that loses, repeats, delays and swaps keeps a datagram for itself', () => {
  for (let seed = 1; seed <= 60; seed++) {
    const random = new Random(seed)
    const world = {
      loss: random.next() * 0.4,
      repeats: random.next() * 0.3,
      delayMs: random.next() * 40,
      jitterMs: random.next() * 30,
    }
    transfer(seed, 1 + random.below(400), world)
  }
})

test('a good network is used twice for a datagram, or one lost datagram stops all', () => {
  const good = { loss: 0, repeats: 0, delayMs: 5, jitterMs: 0 }
  assert.equal(transfer(1, 1000, good).sent, 1000)
  const { sent, ms } = transfer(2, 1000, { ...good, loss: 0.01 })
  assert.ok(sent < 1100, `${sent} transmissions`)
  // 16 windows of 64 need 160 ms on their own.
  assert.ok(ms < 1500, `${ms} ms`)
})

test('a sender never gives up on a silent receiver, or repeats without a pause', () => {
  const sender = new NumberedSender()
  sender.extend(3)
  const times: number[] = []
  for (let now = 0; !sender.failed && now < 60_000; now++) {
    if (sender.due(now).length > 0) times.push(now)
  }
  assert.ok(sender.failed)
  assert.deepEqual(
    times.slice(1).map((at, i) => at - times[i]!),
    [50, 100, 200, 400, 800, 1600, 2000, 2000, 2000, 2000],
  )
})

test('an ACK from long ago, or of what was never sent, moves the window', () => {
  const sender = new NumberedSender()
  sender.extend(10)
  assert.equal(sender.due(0).length, 10)
  sender.acknowledge(5, 0n, 64, 1)
  sender.acknowledge(2, ~0n, 64, 2)
  assert.equal(sender.firstMissing, 5)
  sender.acknowledge(11, 0n, 64, 3)
  assert.equal(sender.firstMissing, 5)
  sender.acknowledge(10, ~0n, 64, 4)
  assert.ok(sender.done)
})
