// Owns `lattice inspect`: what a model file holds, what this machine runs, which errors exist.

import { Command } from 'commander'
import type { CpuReport } from '../backends/cpu/variant.ts'
import { ERROR_CODES } from '../errors.ts'
import type { Model, TensorRef } from '../model/model.ts'
import { inspectGpu } from './inspect-gpu.ts'
import { formatBytes, formatTable } from './table.ts'

interface JsonOption {
  json?: boolean
}

export function inspectCommand(): Command {
  const inspect = new Command('inspect').description(
    'Describes a model file, this CPU or GPU, or the error codes.',
  )
  inspect
    .command('model')
    .summary("a model's hyper-parameters, tensor types and sizes")
    .description("Prints a model's hyper-parameters, tensor types and sizes; loads no weights.")
    .argument('[MODEL]', 'a name from `lattice ls`, a source as for pull, or a path')
    .option('--tensors', 'list every tensor')
    .option('--json', 'print JSON')
    .action(inspectModel)
  inspect
    .command('cpu')
    .summary('the compute library for this CPU, and why that one')
    .description('Prints which build of the compute library this CPU runs, and why that one.')
    .option('--json', 'print JSON')
    .action(inspectCpu)
  inspect
    .command('gpu')
    .summary('the GPUs, and the libraries that computing on them needs')
    .description(
      'Prints the GPUs and CUDA libraries that were found, or what is missing and how to get it.',
    )
    .option('--json', 'print JSON')
    .action(inspectGpu)
  inspect
    .command('errors')
    .summary('every error code with its HTTP status and exit code')
    .description('Prints every error code with its HTTP status and exit code.')
    .option('--json', 'print JSON')
    .action(inspectErrors)
  return inspect
}

async function inspectModel(
  source: string | undefined,
  options: JsonOption & { tensors?: boolean },
): Promise<void> {
  const { resolveModel } = await import('../model/registry.ts')
  const { openModel } = await import('../model/load.ts')
  const { id, path } = await resolveModel(source)
  const model = openModel(path)
  const tensors = [...model.tensors.values()]
  if (options.json) return printJson(modelJson(id, path, model, options.tensors ? tensors : []))
  const rows: [string, string][] = [
    ['Model', id],
    ['Path', path],
    [
      'Format',
      `${model.format}, ${model.files.length === 1 ? '1 file' : `${model.files.length} files`}`,
    ],
    ['Parameters', tensors.reduce((sum, tensor) => sum + elements(tensor), 0).toLocaleString('en')],
    ['Weights', formatBytes(tensors.reduce((sum, tensor) => sum + tensor.byteLength, 0))],
    ['Chat template', model.chatTemplate === undefined ? 'none' : 'yes'],
    ...Object.entries(model.config)
      .filter(([, value]) => value !== undefined)
      .map(([key, value]): [string, string] => [title(key), plain(value)]),
  ]
  print(formatTable([{ title: 'PROPERTY' }, { title: 'VALUE' }], rows))
  print(`\n${typeTable(tensors)}`)
  if (options.tensors) print(`\n${tensorTable(tensors)}`)
}

function modelJson(id: string, path: string, model: Model, tensors: TensorRef[]): object {
  return {
    id,
    path,
    format: model.format,
    files: model.files,
    config: model.config,
    chat_template: model.chatTemplate !== undefined,
    types: byType([...model.tensors.values()]),
    ...(tensors.length > 0 ? { tensors } : {}),
  }
}

function byType(tensors: readonly TensorRef[]): object[] {
  return Object.entries(Object.groupBy(tensors, (tensor) => tensor.type)).map(([type, group]) => ({
    type,
    tensors: group.length,
    elements: group.reduce((sum, tensor) => sum + elements(tensor), 0),
    bytes: group.reduce((sum, tensor) => sum + tensor.byteLength, 0),
  }))
}

function typeTable(tensors: readonly TensorRef[]): string {
  const rows = (
    byType(tensors) as { type: string; tensors: number; elements: number; bytes: number }[]
  ).map((group) => [
    group.type,
    String(group.tensors),
    group.elements.toLocaleString('en'),
    formatBytes(group.bytes),
    ((group.bytes * 8) / group.elements).toFixed(2),
  ])
  const right = true
  return formatTable(
    [
      { title: 'TYPE' },
      { title: 'TENSORS', right },
      { title: 'ELEMENTS', right },
      { title: 'SIZE', right },
      { title: 'BITS EACH', right },
    ],
    rows,
  )
}

function tensorTable(tensors: readonly TensorRef[]): string {
  return formatTable(
    [{ title: 'TENSOR' }, { title: 'TYPE' }, { title: 'SHAPE' }, { title: 'SIZE', right: true }],
    tensors.map(({ name, type, shape, byteLength }) => [
      name,
      type,
      shape.join(' × '),
      formatBytes(byteLength),
    ]),
  )
}

async function inspectCpu({ json }: JsonOption): Promise<void> {
  const { describeCpu } = await import('../backends/cpu/variant.ts')
  const report: CpuReport = describeCpu()
  if (json) return printJson(report)
  print(`Chosen: ${report.chosen}, because ${report.reason}`)
  print(`Threads: ${report.threads} on ${report.cores}`)
  print(`Features: ${report.features.join(' ')}\n`)
  print(
    formatTable(
      [{ title: 'BUILD' }, { title: 'SCORE', right: true }, { title: 'RUNS HERE' }],
      report.candidates.map(({ name, score, usable }) => [
        name === report.chosen ? `${name} ←` : name,
        String(score),
        usable ? 'yes' : 'no',
      ]),
    ),
  )
}

function inspectErrors({ json }: JsonOption): void {
  if (json) return printJson(ERROR_CODES)
  print(
    formatTable(
      [{ title: 'CODE' }, { title: 'HTTP', right: true }, { title: 'EXIT', right: true }],
      Object.entries(ERROR_CODES).map(([code, { status, exit }]) => [
        code,
        String(status),
        String(exit),
      ]),
    ),
  )
  print('\ndocs/errors.md says what each means and what to do.')
}

function elements(tensor: TensorRef): number {
  return tensor.shape.reduce((product, length) => product * length, 1)
}

/** feedForward → Feed forward */
function title(key: string): string {
  const words = key.replace(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`)
  return words.charAt(0).toUpperCase() + words.slice(1)
}

/** A value on one line; long lists by their length. */
function plain(value: unknown): string {
  // Past six digits a 32-bit float is noise: 0.00001 is stored as 0.000009999999747378752.
  if (typeof value === 'number') return String(Number(value.toPrecision(6)))
  if (typeof value !== 'object' || value === null) return String(value)
  if (ArrayBuffer.isView(value)) return `${(value as Float32Array).length} values`
  if (Array.isArray(value)) return `${value.length} values`
  return Object.entries(value)
    .map(([key, inner]) => `${title(key).toLowerCase()} ${plain(inner)}`)
    .join(', ')
}

function printJson(value: object): void {
  // Typed arrays would print as objects with an index a line.
  const list = (_key: string, inner: unknown): unknown =>
    ArrayBuffer.isView(inner) ? [...(inner as Float32Array)] : inner
  print(JSON.stringify(value, list, 2))
}

function print(text: string): void {
  process.stdout.write(`${text}\n`)
}
