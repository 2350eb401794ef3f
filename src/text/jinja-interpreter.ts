// Owns what the Jinja interpreter we build on does otherwise than Python's: what filters make of
// values that are not there, and how values other than text are written.

import { Interpreter } from '@huggingface/jinja'

interface Node {
  type: string
}

interface Filtering extends Node {
  operand: Node
  filter: { value?: string; callee?: { value?: string } }
}

/** A run-time value; lists hold values, objects a Map of them. */
interface Value {
  type: string
  value: unknown
  toString(): string
}

/** Stands in the program for a value already there. */
interface Held extends Node {
  type: 'Held'
  held: Value
}

/** The package's declarations do not resolve under Node's module rules; this is what we use. */
const BaseInterpreter = Interpreter as unknown as new (environment: object) => {
  run(program: object): Value
  evaluate(node: Node | undefined, environment: object): Value
  evaluateBlock(statements: Node[], environment: object): Value
}

/** Filters that take none, like what is undefined, for an empty list. */
const SELECTIONS: ReadonlySet<string> = new Set([
  'select',
  'reject',
  'selectattr',
  'rejectattr',
  'map',
])
const LISTS: ReadonlySet<string> = new Set(['list', 'join', 'length', 'sort', 'unique', 'reverse'])
const TEXTS: ReadonlySet<string> = new Set([
  'trim',
  'upper',
  'lower',
  'title',
  'capitalize',
  'string',
  'replace',
  'indent',
])

export class JinjaInterpreter extends BaseInterpreter {
  override evaluate(node: Node | undefined, environment: object): Value {
    if (node?.type === 'Held') return (node as Held).held
    if (node?.type !== 'FilterExpression') return super.evaluate(node, environment)
    const { operand, filter } = node as Filtering
    const name = filter.value ?? filter.callee?.value ?? ''
    let held = this.evaluate(operand, environment)
    const replacement = name === 'string' ? text(asString(held)) : emptyFor(held, name)
    if (replacement !== undefined) held = super.evaluate(replacement, environment)
    return super.evaluate({ ...node, operand: { type: 'Held', held } } as Node, environment)
  }

  override evaluateBlock(statements: Node[], environment: object): Value {
    let written = ''
    for (const statement of statements) written += print(this.evaluate(statement, environment))
    return super.evaluate(text(written), environment)
  }
}

const text = (value: string): Node => ({ type: 'StringLiteral', value }) as Node
const EMPTY_LIST = { type: 'ArrayLiteral', value: [] } as Node

/** The literal that a filter takes a missing operand for. */
function emptyFor({ type }: Value, filter: string): Node | undefined {
  if (type !== 'UndefinedValue' && type !== 'NullValue') return undefined
  if (SELECTIONS.has(filter)) return EMPTY_LIST
  if (type === 'NullValue') return undefined
  if (LISTS.has(filter)) return EMPTY_LIST
  return TEXTS.has(filter) ? text('') : undefined
}

/** As `{{ value }}` writes it. None is nothing: no template means to say "None" to a model. */
function print(value: Value): string {
  return value.type === 'NullValue' ? '' : asString(value)
}

/** Python's str(). */
function asString(value: Value): string {
  if (value.type === 'UndefinedValue') return ''
  return value.type === 'StringValue' ? (value.value as string) : represent(value)
}

/** Python's repr(). */
function represent(value: Value): string {
  switch (value.type) {
    case 'NullValue':
      return 'None'
    case 'BooleanValue':
      return value.value === true ? 'True' : 'False'
    case 'StringValue':
      return quote(value.value as string)
    case 'ArrayValue':
      return `[${(value.value as Value[]).map(represent).join(', ')}]`
    case 'ObjectValue': {
      const entries = [...(value.value as Map<string, Value>)]
      return `{${entries.map(([key, one]) => `${quote(key)}: ${represent(one)}`).join(', ')}}`
    }
    default:
      return value.toString()
  }
}

/** Single quotes unless they are inside and double quotes are not. */
function quote(content: string): string {
  const mark = content.includes("'") && !content.includes('"') ? '"' : "'"
  const escaped = content
    .replaceAll('\\', '\\\\')
    .replaceAll(mark, `\\${mark}`)
    .replaceAll('\n', '\\n')
    .replaceAll('\r', '\\r')
    .replaceAll('\t', '\\t')
  return mark + escaped + mark
}
