// Holds dates to Python's strftime: the expected strings are what it prints for the same times.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { strftime } from './strftime.ts'

test('a date is written otherwise than by Python', () => {
  const date = new Date(2024, 1, 3, 0, 5, 9)
  const formats = '%a %A %b %B|%d %e %-d|%H %I %M %S %p|%j %m %y %Y|%F %T|%%'
  const written =
    'Sat Saturday Feb February|03  3 3|00 12 05 09 AM|034 02 24 2024|2024-02-03 00:05:09|%'
  assert.equal(strftime(date, formats), written)
  assert.equal(strftime(new Date(2023, 11, 31, 23, 0, 0), '%j %-j %I%p'), '365 365 11PM')
})

test('a directive that is not known is left in the text', () => {
  assert.throws(() => strftime(new Date(), '%Q'), /%Q/)
})
