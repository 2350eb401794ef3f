// Owns the byte alphabet of GPT-2: each of the 256 bytes as one printable character, the spelling
// in which byte-level vocabularies are written down (Radford et al. 2019, encoder.py).

/** The character for each byte: itself where it prints, else the next free one from U+0100. */
export const BYTE_TO_CHAR: readonly string[] = byteCharacters()

const CHAR_TO_BYTE = new Map(BYTE_TO_CHAR.map((char, byte) => [char, byte]))

function byteCharacters(): string[] {
  const prints = (byte: number): boolean =>
    (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae
  let next = 0x100
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(prints(byte) ? byte : next++))
}

/** The bytes a vocabulary entry spells, or undefined if a character is not of the alphabet. */
export function spelledBytes(entry: string): Uint8Array | undefined {
  const bytes = new Uint8Array(entry.length)
  for (let i = 0; i < entry.length; i++) {
    const byte = CHAR_TO_BYTE.get(entry[i]!)
    if (byte === undefined) return undefined
    bytes[i] = byte
  }
  return bytes
}

/** Spells a text's UTF-8 bytes in the alphabet. */
export function spellBytes(text: string): string {
  let spelled = ''
  for (const byte of Buffer.from(text, 'utf8')) spelled += BYTE_TO_CHAR[byte]!
  return spelled
}

/**
 * Writes the UTF-8 bytes of `text` into `into`, which must hold 3 bytes a code unit; a lone
 * surrogate becomes U+FFFD. For short words this beats a call into the runtime's encoder.
 * @returns the number of bytes written
 */
export function writeUtf8(text: string, into: Uint8Array): number {
  let at = 0
  for (let i = 0; i < text.length; i++) {
    let code = text.charCodeAt(i)
    if (code < 0x80) {
      into[at++] = code
      continue
    }
    if (code < 0x800) {
      into[at++] = 0xc0 | (code >> 6)
      into[at++] = 0x80 | (code & 0x3f)
      continue
    }
    if (code >= 0xd800 && code < 0xe000) {
      const low = code < 0xdc00 ? text.charCodeAt(i + 1) : NaN
      if (low >= 0xdc00 && low < 0xe000) {
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00)
        i++
        into[at++] = 0xf0 | (code >> 18)
        into[at++] = 0x80 | ((code >> 12) & 0x3f)
        into[at++] = 0x80 | ((code >> 6) & 0x3f)
        into[at++] = 0x80 | (code & 0x3f)
        continue
      }
      code = 0xfffd
    }
    into[at++] = 0xe0 | (code >> 12)
    into[at++] = 0x80 | ((code >> 6) & 0x3f)
    into[at++] = 0x80 | (code & 0x3f)
  }
  return at
}
