// Owns where a store's secret comes from: a file that only its owner can read, or the kernel's
// keyring. Sources: keyctl(2), request_key(2).

import { readFileSync, statSync } from 'node:fs'
import { LatticeError } from '../../errors.ts'
import { readKeyring } from '../../ffi/keyring.ts'

/** Fewer could be guessed. */
const SECRET_BYTES_MIN = 32

/**
 * @param source a path, or keyring:NAME for a key of type `user`
 * @throws LatticeError `usage` if it is absent, too short, or others can read it
 */
export function readSecret(source: string): Uint8Array {
  const keyring = /^keyring:(.+)$/.exec(source)?.[1]
  const secret = keyring === undefined ? readKeyFile(source) : readKeyring(keyring)
  if (secret.length >= SECRET_BYTES_MIN) return secret
  secret.fill(0)
  throw new LatticeError(
    'usage',
    `The key in ${source} has ${secret.length} bytes; it takes ${SECRET_BYTES_MIN} at least.`,
    { todo: 'Make one with: head -c 32 /dev/urandom > FILE' },
  )
}

function readKeyFile(path: string): Uint8Array {
  try {
    if ((statSync(path).mode & 0o077) === 0) return readFileSync(path)
  } catch (thrown) {
    const reason = thrown instanceof Error ? thrown.message : String(thrown)
    throw new LatticeError('usage', `The key of the KV store cannot be read: ${reason}.`, {
      todo: 'Give --kv-store-key a file with 32 random bytes, or keyring:NAME.',
      cause: thrown,
    })
  }
  throw new LatticeError('usage', `Others than its owner may read or change the key in ${path}.`, {
    todo: `Run: chmod 600 ${path}`,
  })
}
