// Owns tests that measure times, on machines that other tests keep busy.

const ATTEMPTS = 3

/**
 * What fails for the machine's sake fails once; what is wrong fails each of three times.
 * @throws what the last attempt threw
 */
export async function measured(attempt: () => Promise<void>): Promise<void> {
  for (let i = 1; ; i++) {
    try {
      return await attempt()
    } catch (thrown) {
      if (i === ATTEMPTS) throw thrown
    }
  }
}
