// Owns one view of the archives that package registries hand out: names, and contents by name.

import { tarEntries } from './tar.ts'
import { Zip } from './zip.ts'

export interface Archive {
  readonly path: string
  readonly names: readonly string[]
  /** Contents of an entry; throws LatticeError `download_failed` when the archive is damaged. */
  stream(name: string): AsyncIterable<Buffer>
  close(): Promise<void>
}

/** Opens a wheel (.whl, .zip) or an npm tarball (.tgz). */
export async function openArchive(path: string): Promise<Archive> {
  return path.endsWith('.tgz') ? openTar(path) : openZip(path)
}

/** A small entry as text. */
export async function archiveText(archive: Archive, name: string): Promise<string> {
  const parts: Buffer[] = []
  for await (const part of archive.stream(name)) parts.push(part)
  return Buffer.concat(parts).toString('utf8')
}

async function openZip(path: string): Promise<Archive> {
  const zip = await Zip.open(path)
  const byName = new Map(zip.entries.map((entry) => [entry.name, entry]))
  return {
    path,
    names: [...byName.keys()],
    async *stream(name) {
      const entry = byName.get(name)
      if (entry) yield* zip.stream(entry)
    },
    close: () => zip.close(),
  }
}

/** A tarball has no directory: it is read once for the names and once for each entry. */
async function openTar(path: string): Promise<Archive> {
  const names: string[] = []
  for await (const { name } of tarEntries(path)) names.push(name)
  return {
    path,
    names,
    async *stream(wanted) {
      for await (const { name, contents } of tarEntries(path)) {
        if (name !== wanted) continue
        yield* contents
        return
      }
    },
    close: async () => {},
  }
}
