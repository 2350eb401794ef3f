import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import { fakeApp } from '../../../test/support/fake-server.ts'
import { post } from '../../../test/support/http.ts'
import { chatFields } from './chat.ts'
import { completionFields } from './completions.ts'

const CHAT = { messages: [{ role: 'user', content: 'hi' }] }
const COMPLETION = { prompt: 'hi' }
const { app } = fakeApp()
const chat = (more: object) => post(app.request, '/v1/chat/completions', { ...CHAT, ...more })
const complete = (more: object) => post(app.request, '/v1/completions', { ...COMPLETION, ...more })
const user = (content: unknown): object => ({ messages: [{ role: 'user', content }] })
const assistant = (more: object): object => ({ messages: [{ role: 'assistant', ...more }] })

/** [what is added to a good request, the error's code, the param it names, words it must have] */
type Case = readonly [more: object, code: string, param: string, words?: RegExp]

const BEAMS = { use_beam_search: true, best_of: 4 }

const BOTH: Case[] = [
  [{ temperature: 2.1 }, 'invalid_request', 'temperature', /from 0 to 2, not 2.1/],
  [{ temperature: '1' }, 'invalid_request', 'temperature', /number/],
  [{ top_p: 1.5 }, 'invalid_request', 'top_p', /from 0 to 1/],
  [{ top_k: -2 }, 'invalid_request', 'top_k', /from -1/],
  [{ top_k: 1.5 }, 'invalid_request', 'top_k', /whole/],
  [{ min_p: -0.1 }, 'invalid_request', 'min_p', /from 0 to 1/],
  [{ typical_p: 0 }, 'invalid_request', 'typical_p', /above 0 and at most 1/],
  [{ repetition_penalty: 0 }, 'invalid_request', 'repetition_penalty', /above 0/],
  [{ presence_penalty: 3 }, 'invalid_request', 'presence_penalty', /from -2 to 2/],
  [{ frequency_penalty: -3 }, 'invalid_request', 'frequency_penalty', /from -2 to 2/],
  [{ logit_bias: { a: 1 } }, 'invalid_request', 'logit_bias', /token ids/],
  [{ logit_bias: { 1: 101 } }, 'invalid_request', 'logit_bias', /-100 to 100/],
  [{ logit_bias: { 9999: 1 } }, 'invalid_request', 'logit_bias', /9999.*258/],
  [{ logit_bias: [1] }, 'invalid_request', 'logit_bias', /object, not an array/],
  [{ seed: 1.5 }, 'invalid_request', 'seed', /whole/],
  [{ seed: 2 ** 60 }, 'invalid_request', 'seed', /from -4503599627370496/],
  [{ stop: '' }, 'invalid_request', 'stop', /1 to 1024 bytes/],
  [{ stop: ['a', 1] }, 'invalid_request', 'stop'],
  [{ stop: Array(17).fill('x') }, 'invalid_request', 'stop', /at most 16/],
  [{ stop: 'é'.repeat(513) }, 'invalid_request', 'stop', /1024/],
  [{ n: 0 }, 'invalid_request', 'n', /from 1 to 128/],
  [{ n: 129 }, 'invalid_request', 'n', /from 1 to 128/],
  [{ best_of: 129 }, 'invalid_request', 'best_of', /from 1 to 128/],
  [{ n: 3, best_of: 2 }, 'invalid_request', 'best_of', /'n', which is 3/],
  [{ best_of: 2, stream: true }, 'invalid_request', 'stream', /end/],
  [{ best_of: 2, temperature: 0 }, 'invalid_request', 'best_of', /'temperature'/],
  [{ length_penalty: 2 }, 'invalid_request', 'length_penalty', /'use_beam_search'/],
  [{ early_stopping: true }, 'invalid_request', 'early_stopping', /'use_beam_search'/],
  [{ early_stopping: 'always' }, 'invalid_request', 'early_stopping', /"never"/],
  [{ use_beam_search: 1 }, 'invalid_request', 'use_beam_search', /true or false/],
  [{ use_beam_search: true }, 'invalid_request', 'best_of', /at least 2/],
  [{ ...BEAMS, stream: true }, 'invalid_request', 'stream', /end/],
  [{ ...BEAMS, temperature: 0.5 }, 'invalid_request', 'temperature', /must be 0/],
  [{ ...BEAMS, top_p: 0.5 }, 'invalid_request', 'top_p', /must be 1/],
  [{ ...BEAMS, top_k: 5 }, 'invalid_request', 'top_k', /must be 0/],
  [{ ...BEAMS, presence_penalty: 1 }, 'invalid_request', 'presence_penalty'],
  [{ ...BEAMS, logit_bias: { 1: 1 } }, 'unsupported_parameter', 'logit_bias'],
  [{ ...BEAMS, stop: 'x' }, 'unsupported_parameter', 'stop', /'use_beam_search'/],
  [{ max_tokens: 0 }, 'invalid_request', 'max_tokens', /from 1/],
  [{ stream: 'yes' }, 'invalid_request', 'stream', /true or false/],
  [{ stream_options: { include_usage: true } }, 'invalid_request', 'stream_options', /'stream'/],
  [{ stream: true, stream_options: { x: 1 } }, 'unknown_parameter', 'stream_options.x'],
  [
    { stream: true, stream_options: { include_obfuscation: true } },
    'unsupported_parameter',
    'stream_options.include_obfuscation',
  ],
  [{ ignore_eos: 1 }, 'invalid_request', 'ignore_eos'],
  [{ model: 'other' }, 'model_not_found', 'model', /fake\/model/],
  [{ model: 5 }, 'invalid_request', 'model'],
  [{ store: true }, 'unsupported_parameter', 'store'],
  [{ service_tier: 'flex' }, 'invalid_request', 'service_tier', /"auto" or "default"/],
  [{ metadata: { a: 1 } }, 'invalid_request', 'metadata'],
  [{ frobnicate: null }, 'unknown_parameter', 'frobnicate'],
  [JSON.parse('{"__proto__": 1}') as object, 'unknown_parameter', '__proto__'],
]

const CHAT_ONLY: Case[] = [
  [{ messages: [] }, 'invalid_request', 'messages', /at least 1/],
  [{ messages: null }, 'invalid_request', 'messages', /array/],
  [{ messages: ['hi'] }, 'invalid_request', 'messages[0]', /object/],
  [{ messages: [{ role: 'bot', content: 'x' }] }, 'invalid_request', 'messages[0].role'],
  [user(undefined), 'invalid_request', 'messages[0].content'],
  [user([]), 'invalid_request', 'messages[0].content'],
  [
    user([{ type: 'image_url' }]),
    'unsupported_parameter',
    'messages[0].content[0].type',
    /image_url/,
  ],
  [user([{ type: 'text' }]), 'invalid_request', 'messages[0].content[0].text'],
  [user([{ type: 'text', text: 'x', y: 1 }]), 'unknown_parameter', 'messages[0].content[0].y'],
  [user([null]), 'invalid_request', 'messages[0].content[0].type'],
  [{ messages: [{ role: 'user', content: 'x', y: 1 }] }, 'unknown_parameter', 'messages[0].y'],
  [{ messages: [{ role: 'tool', content: 'x' }] }, 'invalid_request', 'messages[0].tool_call_id'],
  [assistant({ audio: { id: 'x' } }), 'unsupported_parameter', 'messages[0].audio'],
  [
    assistant({
      tool_calls: [{ id: 'x', type: 'function', function: { name: 'f', arguments: '[1]' } }],
    }),
    'invalid_request',
    'messages[0].tool_calls[0].function.arguments',
  ],
  [{ logprobs: 1 }, 'invalid_request', 'logprobs', /true or false/],
  [{ logprobs: true, top_logprobs: 21 }, 'invalid_request', 'top_logprobs', /from 0 to 20/],
  [{ top_logprobs: 2 }, 'invalid_request', 'top_logprobs', /'logprobs'/],
  [{ tools: [{ type: 'x' }] }, 'invalid_request', 'tools[0].type'],
  [{ tools: [{ type: 'function', function: {} }] }, 'invalid_request', 'tools[0].function.name'],
  [
    { tools: [{ type: 'function', function: { name: 'f', strict: true } }] },
    'unsupported_parameter',
    'tools[0].function.strict',
  ],
  [{ tool_choice: 'auto' }, 'invalid_request', 'tool_choice', /'tools'/],
  [
    { tool_choice: 'required', tools: [] },
    'unsupported_parameter',
    'tool_choice',
    /"auto" or "none"/,
  ],
  [{ tool_choice: { type: 'function' } }, 'unsupported_parameter', 'tool_choice'],
  [{ parallel_tool_calls: false }, 'unsupported_parameter', 'parallel_tool_calls'],
  [{ response_format: { type: 'json_object' } }, 'unsupported_parameter', 'response_format'],
  [{ response_format: { type: 'text', x: 1 } }, 'unknown_parameter', 'response_format.x'],
  [{ response_format: 'text' }, 'invalid_request', 'response_format'],
  [{ modalities: ['text', 'audio'] }, 'unsupported_parameter', 'modalities'],
  [{ audio: {} }, 'unsupported_parameter', 'audio'],
  [{ functions: [] }, 'unsupported_parameter', 'functions'],
  [{ function_call: 'auto' }, 'unsupported_parameter', 'function_call'],
  [{ reasoning_effort: 'low' }, 'unsupported_parameter', 'reasoning_effort'],
  [{ web_search_options: {} }, 'unsupported_parameter', 'web_search_options'],
  [{ chat_template_kwargs: { messages: 1 } }, 'invalid_request', 'chat_template_kwargs.messages'],
  [{ prompt: 'x' }, 'unknown_parameter', 'prompt'],
]

const COMPLETION_ONLY: Case[] = [
  [{ prompt: null }, 'invalid_request', 'prompt', /missing/],
  [{ prompt: 5 }, 'invalid_request', 'prompt', /string/],
  [{ prompt: [] }, 'invalid_request', 'prompt'],
  [{ prompt: [[]] }, 'invalid_request', 'prompt[0]', /empty/],
  [{ prompt: ['a', 5] }, 'invalid_request', 'prompt'],
  [{ prompt: [1, 'a'] }, 'invalid_request', 'prompt', /from 0 to 258/],
  [{ prompt: [[1], [259]] }, 'invalid_request', 'prompt[1]', /258/],
  [{ prompt: Array(129).fill('x') }, 'invalid_request', 'prompt', /128/],
  [{ prompt: ['a', 'b'], n: 65 }, 'invalid_request', 'n', /128/],
  [{ logprobs: 21 }, 'invalid_request', 'logprobs', /from 0 to 20/],
  [{ logprobs: true }, 'invalid_request', 'logprobs'],
  [{ echo: true, logprobs: 1 }, 'unsupported_parameter', 'echo'],
  [{ prompt: ['a', 'b'], best_of: 65 }, 'invalid_request', 'best_of', /128/],
  [{ suffix: 'x' }, 'unsupported_parameter', 'suffix'],
  [{ messages: [] }, 'unknown_parameter', 'messages'],
]

async function refuses(
  send: (more: object) => ReturnType<typeof post>,
  [more, code, param, words]: Case,
): Promise<void> {
  const { status, json } = await send(more)
  const { error } = json
  const text = JSON.stringify(more).slice(0, 200)
  assert.ok(status === 400 || status === 404, `${text}: status ${status}`)
  assert.deepEqual([error.code, error.param], [code, param], text)
  assert.match(error.message, words ?? /./)
  assert.equal(error.type, 'invalid_request_error')
}

test('a wrong, unknown or unsupported chat parameter is a 400 that names it', async () => {
  for (const one of [...BOTH, ...CHAT_ONLY]) await refuses(chat, one)
})

test('a wrong, unknown or unsupported completion parameter is a 400 that names it', async () => {
  for (const one of [...BOTH, ...COMPLETION_ONLY]) await refuses(complete, one)
})

test('what asks for nothing special is taken: nulls, neutral values, labels', async () => {
  const labels = {
    user: 'u',
    metadata: { a: 'b' },
    store: false,
    service_tier: 'auto',
    prompt_cache_key: 'k',
    safety_identifier: 's',
    model: 'fake/model',
    n: 1,
  }
  const neutral = {
    response_format: { type: 'text' },
    modalities: ['text'],
    audio: null,
    tools: [],
  }
  assert.equal((await chat({ ...labels, ...neutral, parallel_tool_calls: true })).status, 200)
  const alone = { best_of: 1, use_beam_search: false, length_penalty: 1, early_stopping: false }
  assert.equal((await complete({ ...labels, ...alone, suffix: null })).status, 200)
  const nulls = (fields: object, kept: string): object =>
    Object.fromEntries(
      Object.keys(fields)
        .map((key) => [key, null])
        .filter(([key]) => key !== kept),
    )
  assert.equal((await chat(nulls(chatFields, 'messages'))).status, 200)
  assert.equal((await complete(nulls(completionFields, 'prompt'))).status, 200)
})

test('docs/api.md lists exactly the parameters that are known', () => {
  const doc = readFileSync(new URL('../../../docs/api.md', import.meta.url), 'utf8')
  for (const [title, fields] of [
    ['POST /v1/chat/completions', chatFields],
    ['POST /v1/completions', completionFields],
  ] as const) {
    const start = doc.indexOf(`## ${title}`)
    assert.ok(start >= 0, `docs/api.md has no section ${title}`)
    const shared = doc.slice(doc.indexOf('## Shared parameters')).split('\n## ')[0]!
    const own = doc.slice(start).slice(3).split('\n## ')[0]!
    const rows = `${shared}\n${own}`.matchAll(/^\| `(\w+)` \|/gm)
    const documented = [...rows].map((match) => match[1]).toSorted()
    assert.deepEqual(documented, Object.keys(fields).toSorted())
  }
})
