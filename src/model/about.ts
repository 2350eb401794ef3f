// Owns what a listing says of a model in one line: format, family, quantization, parameters.

import { toLatticeError } from '../errors.ts'
import { warn } from '../log.ts'
import { openModel } from './load.ts'
import type { Model } from './model.ts'

/** What `lattice ls` shows of a model; read once, when it is pulled. */
export interface About {
  format: 'gguf' | 'safetensors'
  architecture: string
  /** The name of the file's mixture of types, such as Q4_K_M; else the type of most bytes. */
  quantization: string
  parameters: number
}

/** What a model is; null, with a warning, when it cannot be run here. */
export function aboutModel(path: string): About | null {
  try {
    const model = openModel(path)
    const { format, config, tensors } = model
    const parameters = [...tensors.values()].reduce(
      (sum, { shape }) => sum + shape.reduce((product, size) => product * size, 1),
      0,
    )
    const quantization = quantizationOf(model)
    return { format, architecture: config.architecture, quantization, parameters }
  } catch (thrown) {
    warn(`it cannot be run: ${toLatticeError(thrown).message}`)
    return null
  }
}

/** Names of general.file_type's values, as llama.h's `enum llama_ftype` numbers them. */
const FILE_TYPES: Readonly<Record<number, string>> = {
  0: 'F32',
  1: 'F16',
  2: 'Q4_0',
  3: 'Q4_1',
  7: 'Q8_0',
  8: 'Q5_0',
  9: 'Q5_1',
  10: 'Q2_K',
  11: 'Q3_K_S',
  12: 'Q3_K_M',
  13: 'Q3_K_L',
  14: 'Q4_K_S',
  15: 'Q4_K_M',
  16: 'Q5_K_S',
  17: 'Q5_K_M',
  18: 'Q6_K',
  19: 'IQ2_XXS',
  20: 'IQ2_XS',
  21: 'Q2_K_S',
  22: 'IQ3_XS',
  23: 'IQ3_XXS',
  24: 'IQ1_S',
  25: 'IQ4_NL',
  26: 'IQ3_S',
  27: 'IQ3_M',
  28: 'IQ2_S',
  29: 'IQ2_M',
  30: 'IQ4_XS',
  31: 'IQ1_M',
  32: 'BF16',
  36: 'TQ1_0',
  37: 'TQ2_0',
}

function quantizationOf({ metadata, tensors }: Model): string {
  const named = FILE_TYPES[Number(metadata.get('general.file_type') ?? -1)]
  if (named !== undefined) return named
  const bytes = new Map<string, number>()
  for (const { type, byteLength } of tensors.values()) {
    bytes.set(type, (bytes.get(type) ?? 0) + byteLength)
  }
  const [most = ['', 0]] = [...bytes].toSorted((a, b) => b[1] - a[1])
  return most[0]
}
