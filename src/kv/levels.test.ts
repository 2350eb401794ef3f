// Catches a place that is lost between two levels, in two at once, or spilled while it is read; and
// frames that run out where the sizes say that they cannot.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { Random } from '../../test/support/random.ts'
import { Levels, type Spill } from './levels.ts'

test('a place is lost, is somewhere else than it was put, or finds no frame for ever', () => {
  const seen = { spills: 0, staged: 0, stayed: 0, pinned: 0, dead: 0, waited: 0 }
  const sizes = fc.record({ frames: fc.integer({ min: 2, max: 40 }), below: fc.nat(40) })
  fc.assert(
    fc.property(sizes, fc.nat(), ({ frames, below }, seed) => {
      const levels = new Levels(frames, below)
      const random = new Random(seed)
      // What each frame and each place below has in it: the number of a save.
      const memory = new Map<number, number>()
      const disk = new Map<number, number>()
      const saved = new Map<number, number>()
      const spills: Spill[] = []
      const pins: number[] = []
      let next = 1
      const endSpill = (at: number): void => {
        const [spill] = spills.splice(at, 1)
        if (!spill) return
        disk.set(spill.below, memory.get(spill.frame)!)
        levels.spilled(spill, random.below(10) === 0)
        seen.spills++
      }
      const save = (place: number): void => {
        for (let i = 0; levels.room === 0; i++) {
          // Whoever waits for a frame has it when places go below, as there is room for that.
          seen.waited++
          spills.push(...levels.spill(3))
          while (pins.length > 0) levels.unpin(pins.pop()!)
          endSpill(0)
          assert.ok(i < 1000, 'a save finds a frame in the end')
        }
        const [frame] = levels.fill(Uint32Array.of(place))
        memory.set(frame!, next)
        saved.set(place, next++)
        levels.filled(Uint32Array.of(place))
      }
      for (let i = 0; i < 150; i++) {
        const place = random.below(levels.capacity)
        const what = random.below(6)
        if (what < 2 && !saved.has(place)) save(place)
        else if (what === 2) spills.push(...levels.spill(levels.short))
        else if (what === 3) endSpill(random.below(Math.max(1, spills.length)))
        else if (saved.has(place) && what === 4 && !pins.includes(place)) {
          if (spills.some((spill) => spill.place === place)) seen.dead++
          levels.forget(place)
          saved.delete(place)
        } else if (saved.has(place) && !levels.isBelow(place)) {
          levels.pin(place)
          pins.push(place)
          seen.pinned++
        }
        if (pins.length > 2) levels.unpin(pins.shift()!)
        for (const [at, content] of saved) {
          if (!levels.isBelow(at)) {
            assert.equal(memory.get(levels.frameOf(at)), content)
            continue
          }
          assert.equal(disk.get(levels.belowOf(at)), content)
          const stage = levels.stage(1)
          assert.ok(stage, 'what is below finds a frame to come back through')
          assert.ok([...saved.keys()].every((other) => !stage.includes(levels.frameOf(other))))
          seen.staged++
          if (random.below(20) > 0) {
            levels.giveStage(stage)
            continue
          }
          memory.set(stage[0]!, content)
          levels.unstage(at, stage[0]!)
          if (!levels.isBelow(at)) seen.stayed++
        }
        levels.check()
      }
    }),
    { seed: 5, numRuns: 300 },
  )
  assert.ok(
    Object.values(seen).every((count) => count > 100),
    JSON.stringify(seen),
  )
})
