// Catches a layout that loses a byte: rows that overlap, pages that are miscounted, slots whose
// rows cannot be counted.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { type KvLayout, layerMajor, liveBytes, pagesFor, tokenMajor, tokensIn } from './layout.ts'

const shapes = fc.record({
  layers: fc.integer({ min: 1, max: 6 }),
  rowBytes: fc.integer({ min: 1, max: 600 }).map((half) => half * 2),
  maxTokens: fc.integer({ min: 1, max: 60 }),
  pageBytes: fc.constantFrom(64, 256, 1024, 4096),
})
const layouts = fc
  .tuple(shapes, fc.boolean())
  .map(([shape, host]) => (host ? layerMajor(shape) : tokenMajor(shape)))
const SETTINGS = { seed: 11, numRuns: 300 }

/** First and last byte of every row of a slot's first `tokens` tokens. */
function* rows(layout: KvLayout, tokens: number): Generator<[first: number, last: number]> {
  const { layers, rowBytes } = layout.shape
  for (let layer = 0; layer < layers; layer++) {
    for (let token = 0; token < tokens; token++) {
      const first = layer * layout.layerStride + token * layout.tokenStride
      yield [first, first + rowBytes - 1]
    }
  }
}

test('two rows of a slot share a byte, or one leaves its slot', () => {
  fc.assert(
    fc.property(layouts, (layout) => {
      const all = [...rows(layout, layout.shape.maxTokens)].toSorted((a, b) => a[0] - b[0])
      all.forEach(([first], i) => assert.ok(i === 0 || first > all[i - 1]![1]))
      assert.ok(all.at(-1)![1] < layout.slotBytes)
    }),
    SETTINGS,
  )
})

test('a number of pages is not the number that is touched', () => {
  fc.assert(
    fc.property(layouts, fc.nat(60), (layout, wanted) => {
      const tokens = Math.min(wanted, layout.shape.maxTokens)
      const { pageBytes } = layout.shape
      const touched = new Set<number>()
      for (const [first, last] of rows(layout, tokens)) {
        for (let page = Math.floor(first / pageBytes); page * pageBytes <= last; page++) {
          touched.add(page)
        }
      }
      assert.equal(pagesFor(layout, tokens), touched.size)
    }),
    SETTINGS,
  )
})

test('pages say that a longer sequence fits than does, or a shorter one', () => {
  fc.assert(
    fc.property(layouts, fc.nat(10_000), (layout, pages) => {
      const tokens = tokensIn(layout, pages)
      assert.ok(pagesFor(layout, tokens) <= pages)
      assert.ok(pagesFor(layout, tokens + 1) > pages)
    }),
    SETTINGS,
  )
})

test('a page belongs to two slots or layers, or a slot begins within a row', () => {
  fc.assert(
    fc.property(layouts, (layout) => {
      assert.equal(layout.slotBytes % layout.shape.pageBytes, 0)
      assert.equal(layout.slotBytes % layout.tokenStride, 0)
      assert.equal(layout.rangeBytes % layout.shape.pageBytes, 0)
      assert.equal(layout.rangeBytes * layout.ranges, layout.slotBytes)
    }),
    SETTINGS,
  )
})

test('live bytes count rounding, or forget a layer', () => {
  const shape = { layers: 30, rowBytes: 768, maxTokens: 8192, pageBytes: 4096 }
  assert.equal(liveBytes(layerMajor(shape), 7), 7 * 30 * 768)
  assert.equal(liveBytes(tokenMajor(shape), 7), 7 * 30 * 768)
  // 16 tokens of 768 bytes are three pages of 4096 exactly, in each layer.
  assert.equal(pagesFor(layerMajor(shape), 16), 90)
  assert.equal(pagesFor(layerMajor(shape), 17), 120)
  assert.equal(pagesFor(tokenMajor(shape), 17), 96)
})
