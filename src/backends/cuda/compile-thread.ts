// Owns a thread's share of the kernels that are compiled at once. Entry point of a worker.

import { workerData } from 'node:worker_threads'
import { type CompileRun, compileShare } from './compile-ahead.ts'
import { ModuleCache } from './module-cache.ts'

const run = workerData as CompileRun
compileShare(run, new ModuleCache(run.folder, run.sources))
