// Owns the names of what a model's matrices may become on a GPU, and which GPUs can multiply it.

/** fp8: e4m3 with a scale a row, and tokens alike. */
export const QUANTIZATIONS = ['fp8'] as const
export type Quantization = (typeof QUANTIZATIONS)[number]

/** Compute capability that tensor cores for e4m3 begin with: Ada, Hopper and later. */
const E4M3_CAPABILITY = 89

/** Why a GPU cannot multiply e4m3; undefined if it can. */
export function whyNotFp8({ capability }: { capability: number }): string | undefined {
  if (capability >= E4M3_CAPABILITY) return undefined
  return `its compute capability is ${(capability / 10).toFixed(1)}, 8.9 is needed`
}
