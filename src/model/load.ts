// Owns opening a model: whatever lies at a path becomes one checked description of it.

import { existsSync, statSync } from 'node:fs'
import { dirname, resolve } from 'node:path'
import { LatticeError } from '../errors.ts'
import { withFile } from './byte-source.ts'
import { configFromGguf } from './config-gguf.ts'
import { unsupported } from './config.ts'
import { DUMMY_PREFIX, dummyModel } from './dummy.ts'
import { type Gguf, readGguf } from './gguf.ts'
import type { Model, TensorRef } from './model.ts'
import { openSafetensors } from './safetensors-model.ts'
import { checkWeights } from './weights.ts'

/**
 * Reads what a model is, but none of its weights.
 *
 * @param path a .gguf file (any part of a split one), or a directory with safetensors files,
 *   config.json and tokenizer.json; or dummy:SHAPE
 * @throws LatticeError `model_not_found`, `gguf_invalid`, `safetensors_invalid`,
 *   `model_unsupported`
 */
export function openModel(path: string): Model {
  if (path.startsWith(DUMMY_PREFIX)) return dummyModel(path)
  const absolute = resolve(path)
  if (isDirectory(absolute)) return openSafetensors(absolute)
  if (/\.(safetensors|json)$/i.test(absolute)) {
    throw new LatticeError('model_not_found', `${absolute} is one file of a model.`, {
      todo: `Give the directory instead: ${dirname(absolute)}`,
    })
  }
  return openGguf(absolute)
}

function isDirectory(path: string): boolean {
  return statSync(path, { throwIfNoEntry: false })?.isDirectory() ?? false
}

function openGguf(path: string): Model {
  return modelFromGguf(
    path,
    partPaths(path).map((part) => ({ path: part, gguf: readGguf(part) })),
  )
}

/** A part of a model: its checked header, and where it lies. */
export interface GgufPart {
  path: string
  gguf: Gguf
}

/** The model that the parts of a file make; metadata is the first part's. */
export function modelFromGguf(path: string, parts: readonly GgufPart[]): Model {
  const metadata = parts[0]?.gguf.metadata ?? new Map<string, never>()
  const tensors = joinParts(parts)
  const embedding = tensors.get('token_embd.weight')
  if (embedding === undefined) {
    const todo = 'Take a whole model, not an adapter or a part.'
    throw unsupported(path, 'it has no tensor token_embd.weight', todo)
  }
  const described = configFromGguf(metadata, {
    path,
    vocab: embedding.shape[1] ?? 0,
    ropeDivisors: readDivisors(parts, tensors.get('rope_freqs.weight')),
  })
  checkWeights(described, tensors, path)
  const template = metadata.get('tokenizer.chat_template')
  return {
    format: 'gguf',
    config: described.config,
    files: parts.map((part) => ({ path: part.path, byteLength: part.gguf.byteLength })),
    tensors,
    metadata,
    tokenizerJson: undefined,
    chatTemplate: typeof template === 'string' ? template : undefined,
    normWeightOffset: 0,
  }
}

const SPLIT = /^(?<stem>.*)-(?<number>\d{5})-of-(?<count>\d{5})\.gguf$/

/** Paths of all parts of a split file, in order, whichever was given; a whole file is its own. */
function partPaths(path: string): string[] {
  const { stem, count } = SPLIT.exec(path)?.groups ?? {}
  if (stem === undefined || count === undefined) return [path]
  const numbers = Array.from({ length: Number(count) }, (_, i) => String(i + 1).padStart(5, '0'))
  const paths = numbers.map((number) => `${stem}-${number}-of-${count}.gguf`)
  const missing = paths.filter((part) => !existsSync(part))
  if (missing.length === 0 && paths.length > 0) return paths
  throw new LatticeError('model_not_found', `Parts of ${path} are missing: ${missing[0]} is one.`, {
    todo: 'Put all parts into one directory.',
    details: { missing: missing.length },
  })
}

/** Every part's tensors in one map; parts must know their own number, as gguf-split writes it. */
function joinParts(parts: readonly GgufPart[]): Map<string, TensorRef> {
  const tensors = new Map<string, TensorRef>()
  parts.forEach(({ path, gguf }, file) => {
    const count = gguf.metadata.get('split.count') ?? 1
    const number = gguf.metadata.get('split.no') ?? 0
    if (parts.length !== (count || 1) || number !== file) {
      const what = `says it is part ${Number(number) + 1} of ${String(count)}`
      throw partError(path, 'split.no', `${what}, its name says ${file + 1} of ${parts.length}`)
    }
    for (const tensor of gguf.tensors) {
      if (tensors.has(tensor.name)) {
        throw partError(path, tensor.name, `has ${tensor.name}, which another part has too`)
      }
      tensors.set(tensor.name, { ...tensor, file })
    }
  })
  return tensors
}

function partError(path: string, field: string, what: string): LatticeError {
  return new LatticeError('gguf_invalid', `${path} ${what}.`, {
    todo: 'Download the parts again, all of one model and with their own names.',
    details: { field },
  })
}

/** rope_freqs.weight is a few hundred bytes, and part of the configuration rather than a weight. */
function readDivisors(parts: readonly GgufPart[], tensor: TensorRef | undefined) {
  if (tensor === undefined) return undefined
  const path = parts[tensor.file]?.path ?? ''
  if (tensor.type !== 'F32' || tensor.byteLength > 1 << 16) {
    const what = `rope_freqs.weight is ${tensor.type} with ${tensor.byteLength} bytes`
    throw unsupported(path, what, 'It must be F32 and as long as half a head.')
  }
  const bytes = new Uint8Array(tensor.byteLength)
  withFile(path, (source) => source.read(bytes, tensor.offset))
  return new Float32Array(bytes.buffer)
}
