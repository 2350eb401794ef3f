// Owns reading ZIP archives (wheels are such): the directory at the end, and entries as streams.
// Source: PKWARE's APPNOTE 6.3, with its 64-bit extension; methods stored and deflate.

import { type FileHandle, open } from 'node:fs/promises'
import { Readable } from 'node:stream'
import { crc32, createInflateRaw } from 'node:zlib'
import { LatticeError } from '../../errors.ts'

export interface ZipEntry {
  name: string
  byteLength: number
  compressedBytes: number
  method: number
  crc: number
  headerOffset: number
}

const END = 0x06054b50
const END64_LOCATOR = 0x07064b50
const END64 = 0x06064b50
const CENTRAL = 0x02014b50
const LOCAL = 0x04034b50
const END_BYTES = 22
const MAX_COMMENT_BYTES = 0xffff
const MAX_DIRECTORY_BYTES = 64 << 20
const NEEDS_64 = 0xffffffff

/** An open archive; close it when done. */
export class Zip {
  readonly entries: readonly ZipEntry[]
  private readonly file: FileHandle
  private readonly path: string

  private constructor(file: FileHandle, path: string, entries: readonly ZipEntry[]) {
    this.file = file
    this.path = path
    this.entries = entries
  }

  /** @throws LatticeError `download_failed` when the file is no whole archive */
  static async open(path: string): Promise<Zip> {
    const file = await open(path, 'r')
    try {
      return new Zip(file, path, await readDirectory(file, path))
    } catch (thrown) {
      await file.close()
      throw thrown
    }
  }

  close(): Promise<void> {
    return this.file.close()
  }

  /** An entry's contents. The last chunk comes only after size and checksum were right. */
  async *stream(entry: ZipEntry): AsyncGenerator<Buffer> {
    const start = await this.dataOffset(entry)
    const end = start + entry.compressedBytes - 1
    const raw =
      entry.compressedBytes === 0
        ? Readable.from([])
        : this.file.createReadStream({ start, end, autoClose: false, highWaterMark: 1 << 20 })
    const contents = entry.method === 8 ? raw.pipe(createInflateRaw({ chunkSize: 1 << 18 })) : raw
    raw.on('error', (error) => contents.destroy(error))
    let bytes = 0
    let crc = 0
    try {
      for await (const chunk of contents as AsyncIterable<Buffer>) {
        bytes += chunk.byteLength
        if (bytes > entry.byteLength) break
        crc = crc32(chunk, crc)
        yield chunk
      }
    } catch (thrown) {
      throw damaged(this.path, `${entry.name} cannot be unpacked (${(thrown as Error).message})`)
    }
    if (bytes !== entry.byteLength || crc !== entry.crc) {
      throw damaged(this.path, `${entry.name} does not have the size or checksum it should`)
    }
  }

  async text(entry: ZipEntry): Promise<string> {
    const parts: Buffer[] = []
    for await (const chunk of this.stream(entry)) parts.push(chunk)
    return Buffer.concat(parts).toString('utf8')
  }

  private async dataOffset(entry: ZipEntry): Promise<number> {
    if (entry.method !== 0 && entry.method !== 8) {
      throw damaged(this.path, `${entry.name} is packed by method ${entry.method}`)
    }
    const header = await readAt(this.file, this.path, entry.headerOffset, 30)
    if (header.readUInt32LE(0) !== LOCAL) throw damaged(this.path, `${entry.name} is not there`)
    return entry.headerOffset + 30 + header.readUInt16LE(26) + header.readUInt16LE(28)
  }
}

function damaged(path: string, what: string): LatticeError {
  return new LatticeError('download_failed', `${path}: ${what}: the archive is damaged.`, {
    todo: 'Try again; clear the cache of pip or npm if it repeats.',
  })
}

async function readAt(
  file: FileHandle,
  path: string,
  offset: number,
  length: number,
): Promise<Buffer> {
  const buffer = Buffer.alloc(length)
  const { bytesRead } = await file.read(buffer, 0, length, offset)
  if (bytesRead !== length) throw damaged(path, 'it ends too early')
  return buffer
}

async function readDirectory(file: FileHandle, path: string): Promise<ZipEntry[]> {
  const { size } = await file.stat()
  const tailBytes = Math.min(size, END_BYTES + MAX_COMMENT_BYTES + 20)
  const tail = await readAt(file, path, size - tailBytes, tailBytes)
  let at = tail.byteLength - END_BYTES
  while (at >= 0 && tail.readUInt32LE(at) !== END) at--
  if (at < 0) throw damaged(path, 'it has no directory')
  let bytes = tail.readUInt32LE(at + 12)
  let offset = tail.readUInt32LE(at + 16)
  if (at >= 20 && tail.readUInt32LE(at - 20) === END64_LOCATOR) {
    const end64 = await readAt(file, path, Number(tail.readBigUInt64LE(at - 12)), 56)
    if (end64.readUInt32LE(0) !== END64) throw damaged(path, 'its directory is not where it says')
    bytes = Number(end64.readBigUInt64LE(40))
    offset = Number(end64.readBigUInt64LE(48))
  }
  if (bytes > MAX_DIRECTORY_BYTES || offset + bytes > size) {
    throw damaged(path, 'its directory does not fit into it')
  }
  return parseDirectory(await readAt(file, path, offset, bytes), path)
}

function parseDirectory(directory: Buffer, path: string): ZipEntry[] {
  const entries: ZipEntry[] = []
  for (let at = 0; at + 46 <= directory.byteLength;) {
    if (directory.readUInt32LE(at) !== CENTRAL) throw damaged(path, 'its directory is garbled')
    const nameBytes = directory.readUInt16LE(at + 28)
    const extraBytes = directory.readUInt16LE(at + 30)
    const next = at + 46 + nameBytes + extraBytes + directory.readUInt16LE(at + 32)
    if (next > directory.byteLength) throw damaged(path, 'its directory is garbled')
    const extra = directory.subarray(at + 46 + nameBytes, at + 46 + nameBytes + extraBytes)
    const sizes = wideSizes(extra, [
      directory.readUInt32LE(at + 24),
      directory.readUInt32LE(at + 20),
      directory.readUInt32LE(at + 42),
    ])
    entries.push({
      name: directory.toString('utf8', at + 46, at + 46 + nameBytes),
      byteLength: sizes[0] ?? 0,
      compressedBytes: sizes[1] ?? 0,
      headerOffset: sizes[2] ?? 0,
      method: directory.readUInt16LE(at + 10),
      crc: directory.readUInt32LE(at + 16),
    })
    at = next
  }
  return entries
}

/** The 64-bit extra field holds, in this order, just those values that 32 bits cannot. */
function wideSizes(extra: Buffer, narrow: readonly number[]): number[] {
  for (let at = 0; at + 4 <= extra.byteLength; at += 4 + extra.readUInt16LE(at + 2)) {
    if (extra.readUInt16LE(at) !== 1) continue
    let wide = at + 4
    return narrow.map((value) => {
      if (value !== NEEDS_64 || wide + 8 > extra.byteLength) return value
      wide += 8
      return Number(extra.readBigUInt64LE(wide - 8))
    })
  }
  return [...narrow]
}
