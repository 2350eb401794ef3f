// Owns the pager's thread. Entry point of a worker.

import { workerData } from 'node:worker_threads'
import { closed, died } from './last-rites.ts'
import { Pager, type PagerStart } from './pager.ts'

const start = workerData as PagerStart
try {
  const pager = new Pager(start)
  pager.run()
  pager.close()
  closed(start)
} catch (thrown) {
  // Here as well as in the main thread, which may be busy and only learns of it later.
  died(start)
  throw thrown
}
