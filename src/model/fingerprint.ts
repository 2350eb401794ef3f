// Owns telling models apart by what they compute: the same tensors have the same fingerprint
// wherever their file lies, another fine-tune of the same shape has another one.

import { createHash } from 'node:crypto'
import { withFile } from './byte-source.ts'
import type { Model } from './model.ts'

/** Of each tensor's begin, middle and end: all of a large model would take seconds to read. */
const SAMPLE_BYTES = 4096

/** 32 hexadecimal digits. @throws LatticeError `model_not_found` if a file has gone */
export function modelFingerprint(model: Model): string {
  const hash = createHash('sha256')
  hash.update(JSON.stringify([model.config, model.normWeightOffset], plain))
  const tensors = [...model.tensors.values()].toSorted((a, b) => (a.name < b.name ? -1 : 1))
  model.files.forEach(({ path }, file) => {
    withFile(path, (source) => {
      for (const tensor of tensors) {
        if (tensor.file !== file) continue
        const { name, type, shape, offset, byteLength } = tensor
        hash.update(JSON.stringify([name, type, shape, byteLength]))
        const sample = new Uint8Array(Math.min(SAMPLE_BYTES, byteLength))
        const last = byteLength - sample.length
        for (const at of [0, Math.floor(last / 2), last]) {
          source.read(sample, offset + at)
          hash.update(sample)
        }
      }
    })
  })
  return hash.digest('hex').slice(0, 32)
}

/** JSON has no typed arrays and no infinite numbers. */
function plain(_key: string, value: unknown): unknown {
  if (value instanceof Float32Array) return [...value]
  return typeof value === 'number' && !Number.isFinite(value) ? String(value) : value
}
