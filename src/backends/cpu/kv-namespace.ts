// Owns the name under which a store keeps KV: what computed it, and how it is laid out. Under
// another name it would be read as something else.

import { createHash } from 'node:crypto'
import type { KvLayout } from '../../kv/layout.ts'
import { modelFingerprint } from '../../model/fingerprint.ts'
import type { Model } from '../../model/model.ts'

/**
 * Part of a path: the model's name for people, a hash for the rest.
 * @param kernels names the compute library's build: another rounds differently
 */
export function kvNamespace(model: Model, kernels: string, layout: KvLayout): string {
  const { ranges, tokenStride, shape } = layout
  // The length of a slot is no part of it: columns lie where they lie in longer ones, too.
  const { layers, rowBytes, pageBytes } = shape
  const format = { version: 1, kernels, ranges, tokenStride, layers, rowBytes, pageBytes }
  const hash = createHash('sha256')
  hash.update(JSON.stringify([modelFingerprint(model), format]))
  const name = model.config.name
    .toLowerCase()
    .replaceAll(/[^a-z0-9]+/g, '-')
    .slice(0, 40)
  return `${name}-${hash.digest('hex').slice(0, 16)}`
}
