// Catches a packet that the program lets through changed, answers without right or wrongly, charges
// for otherwise, or counts twice or not at all: mutated packets, each with its outcome known from a
// second reading of the protocol. LATTICE_FUZZ_PACKETS runs more (npm run fuzz:net: ten million).

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { DROP, PASS, REDIRECT, TX } from './mutations.ts'
import { REFUSALS } from './oracle.ts'
import { twoHosts, WITHOUT_ROOT } from './namespaces.ts'

const PACKETS = Number(process.env['LATTICE_FUZZ_PACKETS'] ?? 240_000)
const SEED = Number(process.env['LATTICE_FUZZ_SEED'] ?? 1)
/** Ten million take minutes. */
const OPTIONS = { skip: WITHOUT_ROOT, timeout: 60_000 + PACKETS / 10 }

const DROPPED = ['bad_header', 'bad_mac', 'bad_type', 'bad_cookie', 'stale', 'no_ring']
/** Not said by the program. */
const OF_ENGINE = new Set(['context', 'prompt', 'replica_lost'])
const CODES = [...REFUSALS].flatMap(([code, name]) =>
  code >= 16 && !OF_ENGINE.has(name) ? [name] : [],
)

test(`a mutated packet is treated otherwise (seed ${SEED})`, OPTIONS, async (t) => {
  const { server, remove } = await twoHosts()
  t.after(() => remove())
  const options = { seed: SEED, packets: PACKETS }
  const { counters, expected, actions, granted, seconds, use } = await server.call(
    'mutate',
    'veth-s',
    options,
  )
  t.diagnostic(`${PACKETS} packets in ${seconds.toFixed(1)} s: ${JSON.stringify(expected)}`)
  const sum = (names: readonly string[]) => names.reduce((n, name) => n + counters[name]!, 0)
  for (const name of ['passed', 'granted', 'repeated', 'forwarded', ...DROPPED, ...CODES]) {
    assert.equal(counters[name], expected[name], `${name} is counted otherwise`)
    assert.ok(counters[name]! > 0, `no packet was ${name}`)
  }
  assert.equal(counters['rejected'], sum(CODES))
  const answered = sum(['granted', 'repeated', 'rejected'])
  assert.equal(counters['hello'], answered)
  assert.equal(sum(['passed', 'hello', 'forwarded', ...DROPPED]), PACKETS)
  const byAction = { [DROP]: sum(DROPPED), [PASS]: counters['passed'], [TX]: answered }
  assert.deepEqual({ ...actions }, { 0: 0, ...byAction, [REDIRECT]: counters['forwarded'] })
  assert.deepEqual([use.granted, use.rejected], [granted, counters['rejected']])
})
