// Owns the shape of products with 1–4 tokens: how gemv.cu is specialised for a matrix, and over
// how many blocks its rows are spread.

/** What is done with a product before it is stored; as gemv.cu numbers it. */
export const GEMV_EPILOGUE = { store: 0, add: 1, glu: 2, logits: 3, rope: 4 } as const

export type GemvEpilogue = keyof typeof GEMV_EPILOGUE

/** The most tokens that products are computed for so; more go to the matrix library. */
export const GEMV_TOKENS_MAX = 4

export interface GemvVariant {
  defines: Readonly<Record<string, number>>
  threads: number
  /** Dynamic shared memory of a block, without that of its rows. */
  inputBytes: number
  /** Shared memory that each row of a block takes. */
  rowBytes: number
}

/** Of weights of e4m3: each takes one and a half conversions, more than there is time for. */
export const E4M3_TOKENS_MAX = 2

const WARPS_MAX = 16
const CHUNK = 256
/** 16-byte loads of a lane that are under way at once. */
const LOADS = 8
/** What a block has without asking; partial sums of its rows must fit. */
const SHARED_BYTES = 48 << 10
/** Room for the static shared memory of gemv.cu, its `scratch`. */
export const GEMV_STATIC_BYTES = 1 << 10

/**
 * The variant for rows of `k` elements, or undefined where the kernel is not made for it: rows that
 * are no whole number of 16-byte loads, or too long for so many tokens.
 * @param e4m3 whether weights are of that type
 */
export function gemvVariant(
  k: number,
  tokens: number,
  epilogue: GemvEpilogue,
  inputNorm: boolean,
  e4m3 = false,
): GemvVariant | undefined {
  if (e4m3 && (k % 16 !== 0 || tokens > E4M3_TOKENS_MAX)) return undefined
  const parts = e4m3 ? 2 : 1
  // Three tokens computed as four would append a row that is none.
  if (k % 8 !== 0 || (tokens !== 1 && tokens !== 2 && tokens !== GEMV_TOKENS_MAX)) return undefined
  const chunks = Math.ceil(k / (CHUNK * parts))
  const perWarp = Math.ceil(chunks / WARPS_MAX)
  // As few warps as do it in as many chunks each: 56 chunks are 4 for each of 14 warps.
  const kWarps = Math.ceil(chunks / perWarp)
  const chunksOfWarp = powerOfTwo(perWarp)
  if (chunksOfWarp > LOADS || (tokens > 1 && tokens * chunksOfWarp > 4)) return undefined
  const groups = Math.max(1, Math.floor(WARPS_MAX / kWarps))
  const inputShared = tokens * chunksOfWarp * parts > 4 || chunksOfWarp * parts > 2
  return {
    defines: {
      K: k,
      TOKENS: tokens,
      KWARPS: kWarps,
      CHUNKS: chunksOfWarp,
      GROUPS: groups,
      ROWS: LOADS / chunksOfWarp,
      EPILOGUE: GEMV_EPILOGUE[epilogue],
      INPUT_NORM: inputNorm ? 1 : 0,
      ...(e4m3 && { E4M3: 1 }),
    },
    threads: 32 * kWarps * groups,
    inputBytes: inputShared ? 512 * tokens * chunksOfWarp * parts * kWarps : 0,
    rowBytes: 4 * tokens * kWarps,
  }
}

/** Blocks for `rows` rows: one a multiprocessor, or as many times that as shared memory asks. */
export function gemvBlocks(variant: GemvVariant, rows: number, multiprocessors: number): number {
  const rowsMax = Math.floor((SHARED_BYTES - variant.inputBytes) / variant.rowBytes) & ~1
  const pairs = Math.ceil(rows / 2)
  const least = Math.min(pairs, multiprocessors)
  const waves = Math.max(1, Math.ceil(pairs / least / (rowsMax / 2)))
  return Math.min(pairs, least * waves)
}

export function gemvSharedBytes(variant: GemvVariant, rows: number, blocks: number): number {
  const pairs = Math.ceil(rows / 2)
  return variant.inputBytes + Math.ceil(pairs / blocks) * 2 * variant.rowBytes
}

/** Whether a block that is launched with so much shared memory has to ask for it. */
export function gemvAsks(sharedBytes: number): boolean {
  return sharedBytes + GEMV_STATIC_BYTES > SHARED_BYTES
}

function powerOfTwo(n: number): number {
  return 2 ** Math.ceil(Math.log2(n))
}
