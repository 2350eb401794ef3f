// Owns reading keys from the kernel's keyrings. Sources: request_key(2), keyctl(2).

import { LatticeError } from '../errors.ts'
import { errnoName } from './libc.ts'
import { addressOf, lastErrno, SYS, syscall } from './syscalls.ts'

const KEYCTL_READ = 11
/** The kernel's bound for keys of type `user`. */
const KEY_BYTES_MAX = 32_767

/**
 * The payload of the key of type `user` with this name, from the thread's, process's, session's or
 * user's keyring.
 * @throws LatticeError `usage` if there is none that may be read
 */
export function readKeyring(name: string): Uint8Array {
  const type = text('user')
  const description = text(name)
  const key = syscall(SYS.requestKey, addressOf(type), addressOf(description))
  if (key < 0) throw unreadable(name)
  const payload = new Uint8Array(KEY_BYTES_MAX)
  const bytes = syscall(SYS.keyctl, KEYCTL_READ, key, addressOf(payload), payload.length)
  if (bytes < 0) throw unreadable(name)
  const secret = payload.slice(0, bytes)
  payload.fill(0)
  return secret
}

/** A string as C has it. */
function text(value: string): Uint8Array {
  const bytes = new Uint8Array(Math.max(128, value.length * 3 + 1))
  new TextEncoder().encodeInto(value, bytes)
  return bytes
}

function unreadable(name: string): LatticeError {
  const errno = errnoName(lastErrno())
  return new LatticeError('usage', `The kernel's keyring gives no key "${name}": ${errno}.`, {
    todo: `Add one: head -c 32 /dev/urandom | keyctl padd user ${name} @u`,
  })
}
