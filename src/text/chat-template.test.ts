// Holds chat templates to Jinja with transformers' settings (tools/goldens/chat_templates.py), and
// to what servers need beyond it.

import assert from 'node:assert/strict'
import { readdirSync, readFileSync } from 'node:fs'
import { test } from 'node:test'
import { LatticeError } from '../errors.ts'
import { type ChatMessage, compileChatTemplate, type RenderOptions } from './chat-template.ts'

interface Golden {
  source: string
  conversations: { messages: ChatMessage[]; tools: unknown[] | null; prompt: boolean }[]
  rendered: { text?: string; error?: string }[]
}

const tokens = { bos_token: '<s>', eos_token: '</s>' }
const user: ChatMessage = { role: 'user', content: 'Hi' }

function render(
  source: string,
  messages: ChatMessage[] = [user],
  options: RenderOptions = {},
): string {
  return compileChatTemplate(source, { toolUse: undefined, tokens }).render(messages, options)
}

const refusal = (code: string, message: RegExp) => (error: unknown) =>
  error instanceof LatticeError && error.code === code && message.test(error.message)

/** The same messages with arguments as OpenAI's API has them: JSON text. */
function written(messages: ChatMessage[]): ChatMessage[] {
  return messages.map((message) =>
    message.tool_calls === undefined
      ? message
      : {
          ...message,
          tool_calls: message.tool_calls.map((call) => ({
            ...call,
            function: { ...call.function, arguments: JSON.stringify(call.function.arguments) },
          })),
        },
  )
}

const folder = new URL('./goldens/templates/', import.meta.url)
for (const name of readdirSync(folder)) {
  const golden = JSON.parse(readFileSync(new URL(name, folder), 'utf8')) as Golden
  const template = compileChatTemplate(golden.source, { toolUse: undefined, tokens })
  golden.conversations.forEach(({ messages, tools, prompt }, i) => {
    test(`${name}, conversation ${i}: rendered otherwise than by Jinja`, () => {
      const options = { ...(tools === null ? {} : { tools }), addGenerationPrompt: prompt }
      const { text, error } = golden.rendered[i]!
      if (error !== undefined) {
        const refused = refusal('template_invalid', new RegExp(error))
        assert.throws(() => template.render(messages, options), refused)
        return
      }
      assert.equal(template.render(messages, options), text)
      assert.equal(template.render(written(messages), options), text)
    })
  })
}

test('a template that cannot be parsed is taken', () => {
  assert.throws(() => render('{% for %}'), refusal('template_invalid', /cannot be parsed/))
})

test('a variable given with the request does not reach the template', () => {
  const source = '{{ "off" if enable_thinking is false else "on" }}'
  assert.equal(render(source, [user], { extra: { enable_thinking: false } }), 'off')
  assert.equal(render(source), 'on')
})

test('a variable given with the request replaces the messages', () => {
  assert.equal(render('{{ messages | length }}', [user], { extra: { messages: [] } }), '1')
})

test('the template for tools is not used where there are tools', () => {
  const template = compileChatTemplate('plain', { toolUse: 'with tools', tokens })
  assert.equal(template.render([user]), 'plain')
  assert.equal(template.render([user], { tools: [] }), 'with tools')
})

test('text parts are not joined to text', () => {
  const parts = [
    { type: 'text', text: 'a' },
    { type: 'text', text: 'b' },
  ]
  assert.equal(render('{{ messages[0].content }}', [{ role: 'user', content: parts }]), 'a\nb')
})

test('an image is dropped without a word', () => {
  const parts = [{ type: 'image_url' }]
  assert.throws(
    () => render('{{ messages[0].content }}', [{ role: 'user', content: parts }]),
    refusal('invalid_request', /messages\[0\].*image_url/),
  )
})

const calling = (given: string): ChatMessage => ({
  role: 'assistant',
  content: null,
  tool_calls: [{ id: 'x', type: 'function', function: { name: 'f', arguments: given } }],
})
const CALL_ARGUMENTS = 'messages[0].tool_calls[0].function.arguments'

test('arguments that are not JSON are passed on', () => {
  const source = `{{ ${CALL_ARGUMENTS} | tojson }}`
  const refused = refusal('invalid_request', /arguments is not JSON/)
  assert.throws(() => render(source, [calling('{"a":')]), refused)
})

test('a template that writes arguments as text writes [object Map]', () => {
  assert.equal(render(`{{ 'x' + ${CALL_ARGUMENTS} }}`, [calling('{"a": 1}')]), 'x{"a": 1}')
  assert.equal(render(`{{ ${CALL_ARGUMENTS} | tojson }}`, [calling('{"a":1}')]), '{"a": 1}')
})

test('a message without a name has one', () => {
  const nameless = { role: 'user', content: 'x', name: undefined } as unknown as ChatMessage
  assert.equal(
    render("{{ messages[0].name is defined }} {{ 'name' in messages[0] }}", [nameless]),
    'False False',
  )
})

test('the date is written in the language of the machine', () => {
  const months = /^\d\d (Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) \d{4}$/
  assert.match(render('{{ strftime_now("%d %b %Y") }}'), months)
  assert.throws(() => render('{{ strftime_now("%Q") }}'), refusal('template_invalid', /%Q/))
})

test('a template runs for ever', () => {
  const source = '{% for i in range(1000000000) %}x{% endfor %}'
  assert.throws(() => render(source), refusal('template_invalid', /range/))
})

test('a template that writes no tools is believed to, or one that does not to', () => {
  const takes = (source: string, toolUse?: string) =>
    compileChatTemplate(source, { toolUse, tokens }).takesTools
  assert.equal(takes('{{ messages[0].content }}'), false)
  assert.equal(takes('{% if tools %}{{ tools }}{% endif %}'), true)
  assert.equal(takes('{% for call in message.tool_calls or [] %}{% endfor %}'), false)
  assert.equal(takes('plain', '{{ tools }}'), true)
})
