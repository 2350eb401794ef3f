// Owns what Jinja's filters do with values that are not there: as in Python, an undefined value
// counts as empty text or an empty list, where the interpreter we build on refuses it.

import { Interpreter } from '@huggingface/jinja'

interface Node {
  type: string
}

interface Value {
  value: unknown
}

/** Its declarations do not resolve under Node's module rules; this is what we use of it. */
const BaseInterpreter = Interpreter as unknown as new (environment: object) => {
  run(program: object): Value
  evaluate(node: Node | undefined, environment: object): Value
}

interface Filtering extends Node {
  filter: { value?: string; callee?: { value?: string } }
}

/** Filters that take nothing at all, even none, for an empty list. */
const SELECTIONS: ReadonlySet<string> = new Set([
  'select',
  'reject',
  'selectattr',
  'rejectattr',
  'map',
])
const LISTS: ReadonlySet<string> = new Set(['list', 'join', 'length', 'sort', 'unique', 'reverse'])

const REFUSED = /filter ".*" to type: (UndefinedValue|NullValue)$/

export class JinjaInterpreter extends BaseInterpreter {
  override evaluate(node: Node | undefined, environment: object): Value {
    if (node?.type !== 'FilterExpression') return super.evaluate(node, environment)
    try {
      return super.evaluate(node, environment)
    } catch (error) {
      const refused = REFUSED.exec(error instanceof Error ? error.message : '')
      const empty =
        refused === null ? undefined : emptyFor(node as Filtering, refused[1] === 'NullValue')
      if (empty === undefined) throw error
      return super.evaluate({ ...node, operand: empty } as Node, environment)
    }
  }
}

/** The literal that stands for a missing operand of this filter. */
function emptyFor({ filter }: Filtering, isNone: boolean): object | undefined {
  const name = filter.value ?? filter.callee?.value ?? ''
  if (SELECTIONS.has(name)) return { type: 'ArrayLiteral', value: [] }
  if (isNone) return undefined
  if (LISTS.has(name)) return { type: 'ArrayLiteral', value: [] }
  return { type: 'StringLiteral', value: '' }
}
