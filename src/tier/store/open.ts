// Owns opening a store: a directory for each model and layout, locked for one engine, with a file
// of columns and a log of the prefixes that they belong to. What was torn or changed is left out
// and counted, with all that builds on it.
//
//   DIR/<namespace>/  lock   columns   log: | magic 16 | id 16 | proof of the key 16 | frames … |

import { randomBytes } from 'node:crypto'
import {
  closeSync,
  constants,
  existsSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { LatticeError } from '../../errors.ts'
import { AesGcm, NONCE_BYTES, TAG_BYTES } from '../../ffi/aes-gcm.ts'
import { lockFile, mapAnonymous, unmap } from '../../ffi/libc.ts'
import type { StoredPrefix } from '../../kv/tier.ts'
import type { Keys } from '../keys.ts'
import { openPlaces, type PlaceFile } from '../place-file.ts'
import { scanFrames, StoreKeys } from './frames.ts'
import { type LogStart, syncDirectory } from './log-writer.ts'
import { PrefixIndex } from './prefix-index.ts'
import { decode, type PlaceSeal } from './records.ts'

export interface OpenedStore {
  directory: string
  columns: PlaceFile
  lockFd: number
  keys: StoreKeys
  /** Parents before their children. */
  prefixes: StoredPrefix[]
  /** By place. */
  seals: Map<number, PlaceSeal>
  log: LogStart
  nextId: number
  /** Records and prefixes that were torn or changed, or built on one that was. */
  lost: number
  /** Prefixes that lie where an earlier, larger store had room. */
  beyond: number
}

const MAGIC = Buffer.from('lattice kv log 1')
const ID_BYTES = 16
const HEAD_BYTES = MAGIC.length + ID_BYTES + TAG_BYTES

export interface StoreOptions {
  directory: string
  /** Names the model, the layout and the kernels: KV of one fits no other. */
  namespace: string
  /** Zeroed once keys are derived from it. */
  secret: Uint8Array
}

/**
 * @param capacity places; prefixes that have others are left out
 * @throws LatticeError `kv_store_invalid` for another key, a directory that is in use or no store,
 *   `os_call_failed` for one that cannot be written to
 */
export function openStore(
  { directory, namespace, secret }: StoreOptions,
  keys: Keys,
  capacity: number,
  columnBytes: number,
): OpenedStore {
  const path = join(directory, namespace)
  const lockFd = enter(directory, path)
  try {
    const logPath = join(path, 'log')
    // A crash may have left one that was not whole yet.
    rmSync(`${logPath}.new`, { force: true })
    if (!existsSync(logPath)) createLog(logPath, secret, keys)
    const log = readFileSync(logPath)
    const storeKeys = proveKey(log, path, secret, keys)
    const { payloads, damaged } = scanFrames(log, HEAD_BYTES, storeKeys)
    const index = new PrefixIndex(capacity)
    let [nextId, lost] = [1, damaged]
    for (const { payload, ...frame } of payloads) {
      const record = decode(payload)
      const id = record.kind === 'put' ? record.prefix.id : record.id
      nextId = Math.max(nextId, id + 1)
      if (record.kind === 'put') lost += index.put({ ...record, ...frame })
      else index.drop(id)
    }
    const seals = index.seals()
    const last = payloads.at(-1)
    const opened = {
      directory: path,
      columns: openPlaces(join(path, 'columns'), capacity * columnBytes, constants.O_CREAT),
      lockFd,
      keys: storeKeys,
      prefixes: [...index.standing.values()].map(({ prefix }) => prefix),
      seals,
      log: {
        path: logPath,
        end: last ? last.offset + last.bytes : HEAD_BYTES,
        headBytes: HEAD_BYTES,
        frames: [...index.standing].map(([id, { offset, bytes }]) => [id, offset, bytes] as const),
        rewrite: lost > 0 || index.beyond.size > 0,
        key: keys.addressOf(storeKeys.derive(storeKeys.salt, 'lattice kv log')),
        storeId: storeKeys.storeId,
        salt: storeKeys.salt,
      },
      nextId,
      lost,
      beyond: index.beyond.size,
    }
    for (const { salt } of seals.values()) storeKeys.columnKey(salt)
    storeKeys.columnKey(storeKeys.salt)
    storeKeys.close()
    return opened
  } catch (thrown) {
    closeSync(lockFd)
    throw thrown
  } finally {
    secret.fill(0)
  }
}

/** Makes what is missing of the directories. @returns a file of the inner one, locked */
function enter(directory: string, path: string): number {
  try {
    // One by one: a directory whose parents are missing too is more likely misspelt.
    for (const each of [directory, path]) {
      if (!existsSync(each)) mkdirSync(each, { mode: 0o700 })
    }
    return lock(join(path, 'lock'), path)
  } catch (thrown) {
    if (thrown instanceof LatticeError) throw thrown
    const reason = thrown instanceof Error ? thrown.message : String(thrown)
    throw new LatticeError('os_call_failed', `${path} cannot hold a KV store: ${reason}.`, {
      todo: 'Give --kv-store a directory that can be written to; its parent must exist.',
      cause: thrown,
    })
  }
}

function lock(path: string, directory: string): number {
  const fd = openSync(path, constants.O_RDWR | constants.O_CREAT, 0o600)
  if (lockFile(fd)) return fd
  closeSync(fd)
  throw invalid(`${directory} is in use by another engine.`, 'End it, or give another --kv-store.')
}

function createLog(path: string, secret: Uint8Array, keys: Keys): void {
  const head = Buffer.concat([MAGIC, randomBytes(ID_BYTES), Buffer.alloc(TAG_BYTES)])
  proof(head, secret, keys).copy(head, HEAD_BYTES - TAG_BYTES)
  const fd = openSync(`${path}.new`, 'w', 0o600)
  writeSync(fd, head)
  fsyncSync(fd)
  closeSync(fd)
  renameSync(`${path}.new`, path)
  syncDirectory(join(path, '..'))
}

/** The keys of a store, once its head has shown that it was made with this secret. */
function proveKey(log: Buffer, path: string, secret: Uint8Array, keys: Keys): StoreKeys {
  if (log.length < HEAD_BYTES || !log.subarray(0, MAGIC.length).equals(MAGIC)) {
    throw invalid(`${path} holds no KV store.`, 'Give --kv-store an empty directory.')
  }
  if (!proof(log, secret, keys).equals(log.subarray(HEAD_BYTES - TAG_BYTES, HEAD_BYTES))) {
    throw invalid(
      `${path} was made with another key, or its head was changed.`,
      'Give the right --kv-store-key, or another --kv-store.',
    )
  }
  return new StoreKeys(keys, secret, storeIdOf(log))
}

/** What only who has the secret can write behind a head: a tag of its other bytes. */
function proof(log: Buffer, secret: Uint8Array, keys: Keys): Buffer {
  const storeId = storeIdOf(log)
  const key = new StoreKeys(keys, secret, storeId).derive(storeId, 'lattice kv store')
  const cipher = new AesGcm(keys.addressOf(key))
  const tag = Buffer.alloc(TAG_BYTES)
  const nothing = mapAnonymous(1)
  const associated = log.subarray(0, HEAD_BYTES - TAG_BYTES)
  cipher.seal(nothing, 0, new Uint8Array(NONCE_BYTES), associated, tag)
  unmap(nothing, 1)
  cipher.close()
  return tag
}

function storeIdOf(log: Buffer): Uint8Array {
  return Uint8Array.from(log.subarray(MAGIC.length, MAGIC.length + ID_BYTES))
}

function invalid(what: string, todo: string): LatticeError {
  return new LatticeError('kv_store_invalid', what, { todo })
}
