// Owns reading .tgz archives (npm packages are such) as one stream of entries.
// Source: POSIX.1-2001 pax interchange format, and GNU tar's long names and sizes.

import { createReadStream } from 'node:fs'
import { createGunzip } from 'node:zlib'
import { LatticeError } from '../../errors.ts'

export interface TarEntry {
  name: string
  byteLength: number
  /** The contents; skipped when the next entry is asked for. */
  contents: AsyncIterable<Buffer>
}

const BLOCK = 512
const MAX_HEADER_DATA_BYTES = 1 << 20

/**
 * The files in an archive, in order.
 * @throws LatticeError `download_failed` when it is damaged
 */
export async function* tarEntries(path: string): AsyncGenerator<TarEntry> {
  const reader = new BlockReader(path)
  try {
    let longName: string | undefined
    let longSize: number | undefined
    for (;;) {
      const header = await reader.exactly(BLOCK)
      if (header === undefined || header.every((byte) => byte === 0)) return
      checkSum(header, path)
      const size = longSize ?? sizeOf(header, path)
      const type = String.fromCharCode(header[156] ?? 0)
      if (type === 'x' || type === 'L') {
        const data = await headerData(reader, size, path)
        if (type === 'L') longName = data.toString('utf8').replace(/\0+$/, '')
        else ({ name: longName, size: longSize } = paxFields(data, longName))
        continue
      }
      const start = reader.position
      if (type === '0' || type === '\0') {
        const contents = reader.body(size)
        yield { name: longName ?? nameOf(header), byteLength: size, contents }
      }
      await reader.skip(start + Math.ceil(size / BLOCK) * BLOCK - reader.position)
      longName = undefined
      longSize = undefined
    }
  } finally {
    reader.close()
  }
}

function damaged(path: string, what: string): LatticeError {
  return new LatticeError('download_failed', `${path}: ${what}: the archive is damaged.`, {
    todo: 'Try again; clear the cache of npm if it repeats.',
  })
}

function text(header: Buffer, start: number, length: number): string {
  const field = header.subarray(start, start + length)
  const end = field.indexOf(0)
  return field.toString('utf8', 0, end < 0 ? length : end)
}

function nameOf(header: Buffer): string {
  const prefix = text(header, 257, 5) === 'ustar' ? text(header, 345, 155) : ''
  const name = text(header, 0, 100)
  return prefix === '' ? name : `${prefix}/${name}`
}

/** Octal, or GNU's big-endian binary when the top bit is set. */
function sizeOf(header: Buffer, path: string): number {
  const binary = ((header[124] ?? 0) & 0x80) !== 0
  const size = binary
    ? Number(header.readBigUInt64BE(128))
    : Number.parseInt(text(header, 124, 12).trim() || '0', 8)
  if (Number.isSafeInteger(size) && size >= 0) return size
  throw damaged(path, 'an entry has no size')
}

function checkSum(header: Buffer, path: string): void {
  const expected = Number.parseInt(text(header, 148, 8).trim(), 8)
  let sum = 8 * 32
  header.forEach((byte, at) => (sum += at >= 148 && at < 156 ? 0 : byte))
  if (sum !== expected) throw damaged(path, 'a header has the wrong checksum')
}

async function headerData(reader: BlockReader, size: number, path: string): Promise<Buffer> {
  if (size > MAX_HEADER_DATA_BYTES) throw damaged(path, 'a name is too long')
  const data = await reader.exactly(Math.ceil(size / BLOCK) * BLOCK)
  return (data ?? Buffer.alloc(0)).subarray(0, size)
}

/** Records of the form "LENGTH KEY=VALUE\n". */
function paxFields(data: Buffer, before: string | undefined) {
  let name = before
  let size: number | undefined
  for (let at = 0; at < data.byteLength;) {
    const space = data.indexOf(0x20, at)
    const length = Number(data.toString('latin1', at, space))
    if (space < 0 || !(length > space - at)) break
    const record = data.toString('utf8', space + 1, at + length - 1)
    const equals = record.indexOf('=')
    if (record.slice(0, equals) === 'path') name = record.slice(equals + 1)
    if (record.slice(0, equals) === 'size') size = Number(record.slice(equals + 1))
    at += length
  }
  return { name, size }
}

/** The unpacked stream in pieces of wanted sizes. */
class BlockReader {
  private readonly chunks: AsyncIterator<Buffer>
  private readonly path: string
  private readonly close_: () => void
  private rest: Buffer = Buffer.alloc(0)
  /** Bytes handed out so far. */
  position = 0

  constructor(path: string) {
    this.path = path
    const file = createReadStream(path, { highWaterMark: 1 << 20 })
    const gunzip = file.pipe(createGunzip({ chunkSize: 1 << 18 }))
    file.on('error', (error) => gunzip.destroy(error))
    this.chunks = (gunzip as AsyncIterable<Buffer>)[Symbol.asyncIterator]()
    this.close_ = () => {
      file.destroy()
      gunzip.destroy()
    }
  }

  close(): void {
    this.close_()
  }

  /** Exactly so many bytes; undefined at the end, an error in the middle. */
  async exactly(length: number): Promise<Buffer | undefined> {
    const parts: Buffer[] = []
    for await (const part of this.body(length, true)) parts.push(part)
    const bytes = Buffer.concat(parts)
    return bytes.byteLength === 0 && length > 0 ? undefined : bytes
  }

  async skip(length: number): Promise<void> {
    const passed = this.body(length)
    while (!(await passed.next()).done);
  }

  /** The next bytes as they come. */
  async *body(length: number, mayEnd = false): AsyncGenerator<Buffer> {
    for (let left = length; left > 0;) {
      if (this.rest.byteLength === 0 && !(await this.fill())) {
        if (mayEnd && left === length) return
        throw damaged(this.path, 'it ends too early')
      }
      const part = this.rest.subarray(0, left)
      this.rest = this.rest.subarray(part.byteLength)
      left -= part.byteLength
      this.position += part.byteLength
      yield part
    }
  }

  private async fill(): Promise<boolean> {
    try {
      const { value, done } = await this.chunks.next()
      if (done) return false
      this.rest = value
      return true
    } catch (thrown) {
      throw damaged(this.path, (thrown as Error).message)
    }
  }
}
