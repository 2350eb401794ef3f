// Catches sizes and numbers that are misread instead of refused.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { InvalidArgumentError } from 'commander'
import {
  collect,
  collectOrigin,
  parseCount,
  parseNumber,
  parsePlace,
  parseRate,
  parseSize,
  parseTokens,
  parseUrl,
  parseWatermarks,
} from './parse.ts'

test('a rate is read as another, or one without end is taken', () => {
  assert.deepEqual(parseRate('20:100'), { perSecond: 20, burst: 100 })
  assert.deepEqual(parseRate('0.5'), { perSecond: 0.5, burst: 1 })
  assert.deepEqual(parseRate(' 2.5 '), { perSecond: 2.5, burst: 3 })
  const wrong = [
    '',
    '0',
    '0.001',
    '1e3',
    '20:',
    ':5',
    '20:0',
    '20:1.5',
    '-1',
    '20000000',
    '1:2000000',
  ]
  for (const text of wrong) assert.throws(() => parseRate(text), /Write a rate/, text)
})

test('sizes are powers of 1024, however they are spelt', () => {
  const sizes: [string, number][] = [
    ['512', 512],
    ['512B', 512],
    ['32K', 32_768],
    ['32k', 32_768],
    ['512M', 536_870_912],
    ['512MB', 536_870_912],
    ['512 MiB', 536_870_912],
    ['1.5GiB', 1_610_612_736],
    ['2T', 2_199_023_255_552],
  ]
  for (const [text, bytes] of sizes) assert.equal(parseSize(text), bytes, text)
})

test('what is no size is refused', () => {
  for (const text of [
    '',
    'M',
    '-1K',
    '0',
    '1e3',
    '3Q',
    '512iB',
    '1,5G',
    'NaN',
    '9999999T',
    '0.1',
  ]) {
    assert.throws(() => parseSize(text), InvalidArgumentError, text)
  }
})

test('where KV goes is a size, and a directory if there is a colon', () => {
  assert.deepEqual(parsePlace('8GiB'), { bytes: 8 * 2 ** 30 })
  assert.deepEqual(parsePlace('1M:/mnt/a:b'), { bytes: 1 << 20, path: '/mnt/a:b' })
  for (const text of ['1M:', ':/mnt', '/mnt']) {
    assert.throws(() => parsePlace(text), InvalidArgumentError, text)
  }
})

test('watermarks are percentages, the upper one first', () => {
  assert.deepEqual(parseWatermarks('90:75'), { high: 0.9, low: 0.75 })
  assert.deepEqual(parseWatermarks('0:0'), { high: 0, low: 0 })
  for (const text of ['80:90', '101:80', '90', '90:', '-1:-2', '0.9:0.8', '']) {
    assert.throws(() => parseWatermarks(text), InvalidArgumentError, text)
  }
})

test('counts are whole and within bounds, both included', () => {
  assert.equal(parseCount(0, 65535)('0'), 0)
  assert.equal(parseCount(0, 65535)('65535'), 65535)
  for (const text of ['-1', '65536', '1.5', '1e3', '0x10', '', 'abc']) {
    assert.throws(() => parseCount(0, 65535)(text), /whole number from 0 to 65535/, text)
  }
  assert.throws(() => parseCount(1)('0'), /of at least 1/)
  assert.throws(() => parseCount(1)('99999999999999999999'), InvalidArgumentError)
})

test('numbers are finite and within bounds, both included', () => {
  assert.equal(parseNumber(0, 2)('0.7'), 0.7)
  assert.equal(parseNumber(-2, 2)('-2'), -2)
  for (const text of ['2.1', '-0.1', 'NaN', 'Infinity', '', 'hot']) {
    assert.throws(() => parseNumber(0, 2)(text), /number from 0 to 2/, text)
  }
})

test('addresses lose the slash at their end, and only http is one', () => {
  assert.equal(parseUrl('http://127.0.0.1:8080/'), 'http://127.0.0.1:8080')
  for (const text of ['127.0.0.1:8080', 'localhost', 'ftp://x', '']) {
    assert.throws(() => parseUrl(text), InvalidArgumentError, text)
  }
})

test('a repeated option keeps every value', () => {
  assert.deepEqual(collect('b', collect('a', undefined)), ['a', 'b'])
})

test('a number of tokens is read as bytes are, or refused as such', () => {
  assert.deepEqual(['1', '8192', '8K', ' 32k '].map(parseTokens), [1, 8192, 8192, 32_768])
  for (const text of ['', '0', '-1', '1.5K', '8M', '8KiB', 'abc']) {
    assert.throws(() => parseTokens(text), /Write a number of tokens/, text)
  }
})

test('an origin that no browser sends is taken', () => {
  assert.deepEqual(collectOrigin('http://a:3000', ['*']), ['*', 'http://a:3000'])
  for (const text of ['', 'a', 'http://a/', 'http://a/path', 'localhost:3000']) {
    assert.throws(() => collectOrigin(text, []), /Write an origin/, text)
  }
})
