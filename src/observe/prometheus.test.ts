import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import { Registry } from './prometheus.ts'
import { ServerMetrics } from './server-metrics.ts'

test('the exposition has help, type, escaped labels and cumulative buckets', () => {
  const registry = new Registry()
  const counter = registry.counter('c_total', 'Counts.', ['path'])
  counter.add(1, ['a"b\\c\nd'])
  counter.add(2, ['x'])
  registry.gauge('g', 'Gauges.').set(1.5)
  const histogram = registry.histogram('h', 'Spreads.', [1, 2])
  for (const value of [0.5, 1, 1.5]) histogram.observe(value)
  histogram.observe(9, 2)
  assert.equal(
    registry.text(),
    '# HELP c_total Counts.\n# TYPE c_total counter\n' +
      'c_total{path="a\\"b\\\\c\\nd"} 1\nc_total{path="x"} 2\n' +
      '# HELP g Gauges.\n# TYPE g gauge\ng 1.5\n' +
      '# HELP h Spreads.\n# TYPE h histogram\n' +
      'h_bucket{le="1"} 2\nh_bucket{le="2"} 3\nh_bucket{le="+Inf"} 5\nh_sum 21\nh_count 5\n',
  )
})

test('two metrics of one name are refused', () => {
  const registry = new Registry()
  registry.gauge('g', 'One.')
  assert.throws(() => registry.gauge('g', 'Two.'), /twice/)
})

test('docs/metrics.md documents exactly the metrics that are exported, with their types', () => {
  const doc = readFileSync(new URL('../../docs/metrics.md', import.meta.url), 'utf8')
  const documented = [...doc.matchAll(/^\| `(lattice_\w+)` \| (\w+) \|/gm)].map(
    (match) => `${match[1]} ${match[2]}`,
  )
  const exported = new ServerMetrics().registry.list().map(({ name, type }) => `${name} ${type}`)
  assert.deepEqual(documented.toSorted(), exported.toSorted())
})
