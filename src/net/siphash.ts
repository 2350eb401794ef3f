// Owns SipHash-2-4 (Aumasson and Bernstein, 2012) on this side of the wire.

import { DATA_AT, MEMORY_BYTES, sipMachine, STATE_AT } from './siphash-wasm.ts'

export interface SipKey {
  /** What hashing begins with: v0 … v3, each as its low and high half. */
  readonly state: Int32Array
}

/** "somepseudorandomlygeneratedbytes", as the paper has it: v0 … v3, low and high halves. */
const CONSTANTS = [
  0x70736575, 0x736f6d65, 0x6e646f6d, 0x646f7261, 0x6e657261, 0x6c796765, 0x79746573, 0x74656462,
]

/** @param bytes 16 of them */
export function sipKey(bytes: Uint8Array): SipKey {
  const view = new DataView(bytes.buffer, bytes.byteOffset, 16)
  const words = [0, 4, 8, 12].map((at) => view.getInt32(at, true))
  return { state: Int32Array.from(CONSTANTS, (constant, i) => constant ^ words[i & 3]!) }
}

const machine = sipMachine()
const memory = new DataView(machine.memory.buffer)
const state = new Int32Array(machine.memory.buffer, STATE_AT, 8)
const words = new Int32Array(machine.memory.buffer, DATA_AT)
/** Bytes that are taken in at a time; behind them there is room for the last word. */
const BLOCK_BYTES = MEMORY_BYTES - DATA_AT - 8

/**
 * Writes the hash of bytes [from, to) of `data` into `out` at `at`, big-endian, as the protocol
 * has it.
 */
export function sipHash(
  key: SipKey,
  data: DataView,
  from: number,
  to: number,
  out: DataView,
  at: number,
): void {
  state.set(key.state)
  const whole = to - ((to - from) & 7)
  const behind = takeAllButLast(data, from, whole)
  memory.setInt32(behind, 0)
  memory.setInt32(behind + 4, (to - from) & 255)
  for (let i = whole; i < to; i++) memory.setUint8(behind + i - whole, data.getUint8(i))
  machine.compress(DATA_AT, behind + 8, true)
  write(out, at)
}

const saved = new Int32Array(8)
const hash = new DataView(new ArrayBuffer(8))

/**
 * Hashes of several prefixes of the same bytes, in the time of the longest.
 * @param lengths ascending, multiples of 8, no longer than the data
 */
export function sipPrefixes(key: SipKey, data: DataView, lengths: readonly number[]): bigint[] {
  state.set(key.state)
  let from = 0
  return lengths.map((length) => {
    machine.compress(DATA_AT, takeAllButLast(data, from, length), false)
    from = length
    saved.set(state)
    memory.setInt32(DATA_AT, 0)
    memory.setInt32(DATA_AT + 4, length & 255)
    machine.compress(DATA_AT, DATA_AT + 8, true)
    write(hash, 0)
    state.set(saved)
    return hash.getBigUint64(0)
  })
}

/**
 * Takes in whole words of data; the last block only lies in the memory.
 * @returns the address behind it
 */
function takeAllButLast(data: DataView, from: number, to: number): number {
  let begin = from
  for (; to - begin > BLOCK_BYTES; begin += BLOCK_BYTES) {
    copy(data, begin, begin + BLOCK_BYTES)
    machine.compress(DATA_AT, DATA_AT + BLOCK_BYTES, false)
  }
  copy(data, begin, to)
  return DATA_AT + to - begin
}

/** By 32-bit words: a view for `set` would cost more than most datagrams do. */
function copy(data: DataView, from: number, to: number): void {
  for (let at = from, i = 0; at < to; at += 4, i++) words[i] = data.getInt32(at, true)
}

/** What `compress` left at the end, big-endian. */
function write(out: DataView, at: number): void {
  out.setInt32(at, state[1]!)
  out.setInt32(at + 4, state[0]!)
}
