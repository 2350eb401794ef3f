// Owns the opening of a Hugging Face directory: safetensors files (one or several with an index),
// config.json, tokenizer.json and the chat template become one Model.

import { existsSync, readFileSync } from 'node:fs'
import { basename, join } from 'node:path'
import { LatticeError } from '../errors.ts'
import { configFromJson } from './config-json.ts'
import { unsupported } from './config.ts'
import { canonicalName } from './hf-names.ts'
import { isObject, JsonObject, readJson } from './json.ts'
import type { Model, ModelFile, TensorRef } from './model.ts'
import { readSafetensors, type SafeTensor } from './safetensors.ts'
import { checkWeights } from './weights.ts'

/**
 * Opens a directory; see `openModel`.
 * @param directory an absolute path
 */
export function openSafetensors(directory: string): Model {
  const names = weightFiles(directory)
  const outer = new JsonObject(
    readJson(join(directory, 'config.json')),
    join(directory, 'config.json'),
  )
  const described = configFromJson(outer, basename(directory))
  const { config } = described
  const files: ModelFile[] = []
  const tensors = new Map<string, TensorRef>()
  for (const name of names) {
    const path = join(directory, name)
    const contents = readSafetensors(path)
    for (const tensor of contents.tensors) {
      const ref = tensorRef(tensor, files.length, path, config.architecture)
      if (ref === undefined) continue
      // A tied output is stored twice by some writers; transformers takes the embedding.
      if (ref.name === 'output.weight' && described.tiedOutput === 'yes') continue
      if (tensors.has(ref.name)) throw twice(path, tensor.name)
      tensors.set(ref.name, ref)
    }
    files.push({ path, byteLength: contents.byteLength })
  }
  checkWeights(described, tensors, directory)
  const tokenizerConfig = optionalJson(directory, 'tokenizer_config.json')
  return {
    format: 'safetensors',
    config,
    files,
    tensors,
    metadata: new Map(),
    tokenizerJson: tokenizerJson(directory),
    chatTemplate: chatTemplate(directory, tokenizerConfig),
    normWeightOffset: config.architecture === 'gemma3' ? 1 : 0,
    tokenizerConfig,
    eosTokens: eosTokens(directory, outer),
  }
}

const SINGLE = 'model.safetensors'
const INDEX = 'model.safetensors.index.json'

/** File names of the weights: the single file, or all that the index names. */
function weightFiles(directory: string): string[] {
  if (existsSync(join(directory, SINGLE))) return [SINGLE]
  if (!existsSync(join(directory, INDEX))) {
    throw new LatticeError('model_not_found', `${directory} holds no ${SINGLE} and no ${INDEX}.`, {
      todo: 'Give a .gguf file or a directory with safetensors.',
    })
  }
  const path = join(directory, INDEX)
  const index = new JsonObject(readJson(path), path)
  const map = index.get('weight_map')
  if (!isObject(map)) throw badIndex(path, 'has no weight_map')
  const names = [...new Set(Object.values(map))]
  for (const name of names) {
    if (typeof name === 'string' && name !== '' && basename(name) === name && name !== '..')
      continue
    throw badIndex(path, `names ${JSON.stringify(name)}, which is no file beside it`)
  }
  if (names.length === 0) throw badIndex(path, 'names no file')
  return (names as string[]).toSorted()
}

function badIndex(path: string, what: string): LatticeError {
  return new LatticeError('safetensors_invalid', `${path} ${what}.`, {
    todo: 'Download the file again.',
    details: { field: 'weight_map' },
  })
}

function twice(path: string, name: string): LatticeError {
  return new LatticeError('safetensors_invalid', `${path}: ${name} is there twice.`, {
    todo: 'Take another copy of the model.',
    details: { field: name },
  })
}

const FLOAT_TYPES = { F32: 'F32', F16: 'F16', BF16: 'BF16' } as const

/** A tensor by its canonical name, or undefined for one that text generation does not need. */
function tensorRef(
  tensor: SafeTensor,
  file: number,
  path: string,
  architecture: Model['config']['architecture'],
): TensorRef | undefined {
  const name = canonicalName(tensor.name, architecture)
  if (name === undefined) return undefined
  const { dtype, shape, offset, byteLength } = tensor
  if (!Object.hasOwn(FLOAT_TYPES, dtype)) {
    const todo = 'Take a plain F32, F16 or BF16 model, or a quantized one as GGUF.'
    throw unsupported(path, `${tensor.name} is of type ${dtype}`, todo)
  }
  const type = FLOAT_TYPES[dtype as keyof typeof FLOAT_TYPES]
  return { name, type, shape: shape.toReversed(), file, offset, byteLength }
}

function optionalJson(directory: string, name: string): unknown {
  const path = join(directory, name)
  return existsSync(path) ? readJson(path) : undefined
}

function tokenizerJson(directory: string): unknown {
  const json = optionalJson(directory, 'tokenizer.json')
  if (json !== undefined) return json
  const todo = 'Save it with transformers (AutoTokenizer … save_pretrained), or take a GGUF file.'
  throw unsupported(directory, 'there is no tokenizer.json', todo)
}

/** A file of its own comes first, as in transformers; then tokenizer_config.json's entry. */
function chatTemplate(directory: string, tokenizerConfig: unknown): string | undefined {
  const path = join(directory, 'chat_template.jinja')
  if (existsSync(path)) return readFileSync(path, 'utf8')
  const separate = optionalJson(directory, 'chat_template.json')
  return templateIn(separate) ?? templateIn(tokenizerConfig)
}

function templateIn(json: unknown): string | undefined {
  const template = isObject(json) ? json['chat_template'] : undefined
  if (typeof template === 'string') return template
  if (!Array.isArray(template)) return undefined
  const named = template.find((entry) => isObject(entry) && entry['name'] === 'default')
  return typeof named?.template === 'string' ? named.template : undefined
}

function eosTokens(directory: string, outer: JsonObject): number[] {
  const generation = optionalJson(directory, 'generation_config.json')
  const ids = isObject(generation) ? generation['eos_token_id'] : undefined
  const inner = outer.object('text_config')?.get('eos_token_id')
  const found = ids ?? outer.get('eos_token_id') ?? inner ?? []
  return [found].flat().filter((id): id is number => Number.isSafeInteger(id))
}
