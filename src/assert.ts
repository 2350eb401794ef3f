// Owns the assertion used for programming errors; a user's mistakes are LatticeErrors instead.

/** Throws when an invariant does not hold; the message names the invariant. */
export function assert(condition: unknown, invariant: string): asserts condition {
  if (!condition) throw new Error(`invariant broken: ${invariant}`)
}

/** The value, or an error that names what was missing. */
export function present<T>(value: T | undefined | null, what: string): T {
  if (value === undefined || value === null) throw new Error(`invariant broken: ${what} is missing`)
  return value
}
