import assert from 'node:assert/strict'
import { test } from 'node:test'
import { type Parsed, ToolCallParser } from './tool-calls.ts'

/** Feeds `text` in pieces of `size` characters. */
function parse(text: string, size: number): Parsed {
  const parser = new ToolCallParser()
  const all: Parsed = { text: '', calls: [] }
  const add = (parsed: Parsed): void => {
    all.text += parsed.text
    all.calls.push(...parsed.calls)
  }
  for (let i = 0; i < text.length; i += size) add(parser.push(text.slice(i, i + size)))
  add(parser.end())
  return all
}

const CALL = '<tool_call>{"name":"f","arguments":{"a":[1,"</b>"]}}</tool_call>'
const PARSED = { name: 'f', arguments: '{"a":[1,"</b>"]}' }

test('calls are found and text is kept, however the text is cut into pieces', () => {
  const cases: [text: string, expected: Parsed][] = [
    ['plain < text <tool', { text: 'plain < text <tool', calls: [] }],
    [CALL, { text: '', calls: [PARSED] }],
    [`a ${CALL}`, { text: 'a ', calls: [PARSED] }],
    [`${CALL}\n \n${CALL}\n`, { text: '', calls: [PARSED, PARSED] }],
    [`${CALL}\nthen b`, { text: '\nthen b', calls: [PARSED] }],
    [`<tool_call>{broken</tool_call> x`, { text: '<tool_call>{broken</tool_call> x', calls: [] }],
    ['<tool_call>{"name":1}</tool_call>', { text: '<tool_call>{"name":1}</tool_call>', calls: [] }],
    ['<tool_call>[]</tool_call>', { text: '<tool_call>[]</tool_call>', calls: [] }],
    ['<tool_call>{"name":"f"}</tool_call>', { text: '', calls: [{ name: 'f', arguments: '{}' }] }],
    ['<tool_call>{"name":"f", "argu', { text: '<tool_call>{"name":"f", "argu', calls: [] }],
    ['<<tool_call>', { text: '<<tool_call>', calls: [] }],
  ]
  for (const [text, expected] of cases) {
    for (const size of [1, 2, 3, 7, text.length]) {
      assert.deepEqual(parse(text, size), expected, `${text} in pieces of ${size}`)
    }
  }
})

test('text before a call is given out at once, not held until the end', () => {
  const parser = new ToolCallParser()
  assert.equal(parser.push('hello ').text, 'hello ')
  assert.equal(parser.push('a < b').text, 'a < b')
})
