// Owns fetching one file over HTTP: in parallel ranges where the server has them, resumable
// after any interruption, and named as whole only when it is.

import { existsSync } from 'node:fs'
import { type FileHandle, open, readFile, rename, rm, writeFile } from 'node:fs/promises'
import { dirname } from 'node:path'
import { LatticeError } from '../../errors.ts'
import {
  DOWNLOAD_ATTEMPTS,
  DOWNLOAD_CONNECTIONS,
  DOWNLOAD_MIN_SEGMENT_BYTES,
} from '../../limits.ts'
import { complete, type FetchedFile, needSpace } from './files.ts'
import { chunks, gaveUp, get, type Request, retrying, Transient } from './http.ts'
import { Progress } from './progress.ts'

export interface Download extends Request {
  /** Where the whole file goes; `PATH.partial` and `PATH.partial.json` are there until then. */
  path: string
  label: string
  sha256?: string | undefined
  /** Size by the source's own listing; another one is an error. */
  byteLength?: number | undefined
  retryBaseMs?: number | undefined
}

/** A part of the file that one connection fetches: [next, end) is still missing. */
interface Segment {
  next: number
  end: number
}

/** What a partial file needs to be continued by another process. */
interface State {
  url: string
  byteLength: number
  /** Strong validator of what the bytes belong to; undefined if the server gives none. */
  etag: string | undefined
  segments: Segment[]
}

const STATE_EVERY_MS = 1000

/**
 * Fetches a file.
 * @throws LatticeError `download_failed` (the partial file stays and is continued next time),
 *   `hash_mismatch` (the partial file is removed)
 */
export async function download(options: Download): Promise<FetchedFile> {
  const partial = `${options.path}.partial`
  const statePath = `${partial}.json`
  const progress = new Progress(options.label, options.byteLength)
  try {
    const retry = retrying(DOWNLOAD_ATTEMPTS, options.retryBaseMs)
    const probe = await retry(() => probeServer(options, partial, progress))
    if (probe !== 'complete') {
      const state = await continued(options, partial, statePath, probe)
      await needSpace(dirname(options.path), missingBytes(state))
      await fetchSegments(options, state, partial, statePath, progress)
    }
  } catch (thrown) {
    progress.fail()
    throw thrown
  }
  progress.finish()
  await rm(statePath, { force: true })
  return complete(partial, options.path, options.sha256)
}

/** Asks for the first byte: a server with ranges says the size, one without sends everything. */
async function probeServer(
  options: Download,
  partial: string,
  progress: Progress,
): Promise<Omit<State, 'segments'> | 'complete'> {
  const answer = await get(options, { start: 0, end: 1, ifRange: undefined })
  const { response, watch } = answer
  if (response.status !== 206) {
    const length = Number(response.headers.get('content-length') ?? Number.NaN)
    const byteLength = Number.isFinite(length) ? length : undefined
    if (byteLength !== undefined) checkSize(options, byteLength)
    progress.total = byteLength ?? options.byteLength
    await fetchWhole(options, answer, partial, progress)
    return 'complete'
  }
  await response.body?.cancel()
  watch.stop()
  const byteLength = Number(/\/(\d+)$/.exec(response.headers.get('content-range') ?? '')?.[1])
  if (!Number.isSafeInteger(byteLength)) {
    throw broken(options, 'sends ranges without the size of the file')
  }
  checkSize(options, byteLength)
  progress.total = byteLength
  const etag = response.headers.get('etag') ?? undefined
  return { url: options.url, byteLength, etag: etag?.startsWith('W/') ? undefined : etag }
}

function checkSize(options: Download, byteLength: number): void {
  const { byteLength: expected } = options
  if (expected === undefined || expected === byteLength) return
  throw broken(options, `has ${byteLength} bytes, but its listing says ${expected}`)
}

function broken(options: Download, what: string): LatticeError {
  return new LatticeError('download_failed', `${options.url} ${what}.`, {
    todo: 'Try again later, or take another source.',
  })
}

async function fetchWhole(
  options: Download,
  answer: Awaited<ReturnType<typeof get>>,
  partial: string,
  progress: Progress,
): Promise<void> {
  progress.set(0)
  const { total } = progress
  if (total !== undefined) await needSpace(dirname(partial), total)
  const file = await open(partial, 'w')
  let done = 0
  try {
    for await (const chunk of chunks(answer, options)) {
      await writeFully(file, chunk, done)
      done += chunk.byteLength
      progress.add(chunk.byteLength)
    }
  } finally {
    await file.close()
  }
  if (total !== undefined && done !== total) {
    throw new Transient(`${done} of ${total} bytes came`)
  }
}

/** What an earlier attempt left, if it was of the same file; else all of it is missing. */
async function continued(
  options: Download,
  partial: string,
  statePath: string,
  probe: Omit<State, 'segments'>,
): Promise<State> {
  const before = existsSync(partial) ? await readState(statePath) : undefined
  // Without a hash or a validator, nothing says that the bytes belong together.
  const sure = probe.etag !== undefined || options.sha256 !== undefined
  const same = before?.byteLength === probe.byteLength && before.etag === probe.etag
  if (before !== undefined && sure && same) return { ...probe, segments: before.segments }
  await rm(partial, { force: true })
  const { byteLength } = probe
  const most = Math.ceil(byteLength / DOWNLOAD_MIN_SEGMENT_BYTES)
  const count = Math.max(1, Math.min(DOWNLOAD_CONNECTIONS, most))
  const size = Math.ceil(byteLength / count)
  const segments = Array.from({ length: count }, (_, i) => ({
    next: Math.min(byteLength, i * size),
    end: Math.min(byteLength, (i + 1) * size),
  }))
  return { ...probe, segments }
}

async function readState(path: string): Promise<State | undefined> {
  try {
    const state = JSON.parse(await readFile(path, 'utf8')) as State
    const good = (segment: Segment) =>
      segment.next >= 0 && segment.next <= segment.end && segment.end <= state.byteLength
    return state.segments.every(good) ? state : undefined
  } catch {
    // A state that cannot be read is no state: the file is fetched from its beginning.
    return undefined
  }
}

function missingBytes({ segments }: State): number {
  return segments.reduce((sum, { next, end }) => sum + end - next, 0)
}

async function fetchSegments(
  options: Download,
  state: State,
  partial: string,
  statePath: string,
  progress: Progress,
): Promise<void> {
  progress.resumeAt(state.byteLength - missingBytes(state))
  const file = await open(partial, existsSync(partial) ? 'r+' : 'w')
  const stop = new AbortController()
  const signals = options.signal ? [options.signal, stop.signal] : [stop.signal]
  const request = { ...options, signal: AbortSignal.any(signals) }
  const saver = new StateSaver(file, state, statePath)
  try {
    await saver.save()
    const all = state.segments.map((segment) =>
      fetchSegment(request, state, segment, file, (bytes) => {
        progress.add(bytes)
        return saver.maybeSave()
      }),
    )
    // One segment that gives up ends the others, and all are waited for before the file closes.
    for (const one of all) one.catch((thrown: unknown) => stop.abort(thrown))
    const results = await Promise.allSettled(all)
    await saver.save()
    const failed = results.find((result) => result.status === 'rejected')
    if (failed) throw failed.reason
  } finally {
    await file.close()
  }
}

/** Fetches what a segment lacks, over as many connections as it takes while bytes come. */
async function fetchSegment(
  request: Download,
  state: State,
  segment: Segment,
  file: FileHandle,
  onBytes: (count: number) => Promise<void>,
): Promise<void> {
  for (let failures = 0; segment.next < segment.end;) {
    const before = segment.next
    try {
      await fetchRange(request, state, segment, file, onBytes)
    } catch (thrown) {
      if (!(thrown instanceof Transient)) throw thrown
      failures = segment.next > before ? 1 : failures + 1
      if (failures >= DOWNLOAD_ATTEMPTS) throw gaveUp(thrown)
      await pause((request.retryBaseMs ?? 500) * 2 ** (failures - 1), thrown, request)
    }
  }
}

async function pause(usualMs: number, { waitMs }: Transient, request: Request): Promise<void> {
  await new Promise((resolve) => {
    setTimeout(resolve, waitMs ?? usualMs)
  })
  request.signal?.throwIfAborted()
}

async function fetchRange(
  request: Download,
  state: State,
  segment: Segment,
  file: FileHandle,
  onBytes: (count: number) => Promise<void>,
): Promise<void> {
  const answer = await get(request, { start: segment.next, end: segment.end, ifRange: state.etag })
  const from = /^bytes (\d+)-/.exec(answer.response.headers.get('content-range') ?? '')?.[1]
  if (answer.response.status !== 206 || Number(from) !== segment.next) {
    answer.watch.stop()
    await answer.response.body?.cancel()
    throw broken(request, 'changed while it was fetched')
  }
  for await (const chunk of chunks(answer, request)) {
    const room = chunk.subarray(0, segment.end - segment.next)
    await writeFully(file, room, segment.next)
    segment.next += room.byteLength
    await onBytes(room.byteLength)
  }
  if (segment.next < segment.end) throw new Transient('the connection ended early')
}

async function writeFully(file: FileHandle, chunk: Uint8Array, position: number): Promise<void> {
  for (let done = 0; done < chunk.byteLength;) {
    const { bytesWritten } = await file.write(chunk, done, chunk.byteLength - done, position + done)
    done += bytesWritten
  }
}

/** Writes the state now and then, never ahead of the bytes that it speaks of. */
class StateSaver {
  private readonly file: FileHandle
  private readonly state: State
  private readonly path: string
  private savedAt = performance.now()
  private saving: Promise<void> | undefined

  constructor(file: FileHandle, state: State, path: string) {
    this.file = file
    this.state = state
    this.path = path
  }

  async maybeSave(): Promise<void> {
    if (this.saving || performance.now() - this.savedAt < STATE_EVERY_MS) return
    await this.save()
  }

  async save(): Promise<void> {
    await this.saving
    this.saving = this.write().finally(() => {
      this.saving = undefined
      this.savedAt = performance.now()
    })
    await this.saving
  }

  private async write(): Promise<void> {
    const text = JSON.stringify(this.state)
    await this.file.datasync()
    await writeFile(`${this.path}.new`, text)
    await rename(`${this.path}.new`, this.path)
  }
}
