import assert from 'node:assert/strict'
import { test } from 'node:test'
import { fakeApp } from '../../test/support/fake-server.ts'
import { BOS, END_OF_TURN } from '../../test/support/fake-tokenizer.ts'
import { post } from '../../test/support/http.ts'

const { app } = fakeApp()
const bytes = (text: string): number[] => [...Buffer.from(text)]

test('tokenize gives what completions would feed in, with or without special tokens', async () => {
  const { json } = await post(app.request, '/tokenize', { prompt: 'hé' })
  const tokens = [BOS, ...bytes('hé')]
  assert.deepEqual(json, { count: 4, max_model_len: 1024, tokens, token_strs: null })
  const bare = await post(app.request, '/tokenize', {
    prompt: 'h',
    add_special_tokens: false,
    return_token_strs: true,
  })
  assert.deepEqual(bare.json.tokens, bytes('h'))
  assert.deepEqual(bare.json.token_strs, ['<0x68>'])
})

test('tokenize of messages is the chat prompt', async () => {
  const messages = [{ role: 'user', content: 'hi' }]
  const { json } = await post(app.request, '/tokenize', { messages })
  const turn = [BOS, ...bytes('user: hi'), END_OF_TURN, ...bytes('\n')]
  assert.deepEqual(json.tokens, [...turn, ...bytes('assistant: ')])
  const without = { messages, add_generation_prompt: false }
  assert.deepEqual((await post(app.request, '/tokenize', without)).json.tokens, turn)
})

test('detokenize gives the text back, special tokens included', async () => {
  const { json } = await post(app.request, '/detokenize', { tokens: [BOS, ...bytes('hé')] })
  assert.deepEqual(json, { prompt: '<|bos|>hé' })
})

test('what cannot be meant is refused by name', async () => {
  const cases: [path: string, body: object, param: string][] = [
    ['/tokenize', {}, 'prompt'],
    ['/tokenize', { prompt: 'a', messages: [{ role: 'user', content: 'x' }] }, 'prompt'],
    ['/tokenize', { prompt: 'a', tools: [] }, 'tools'],
    ['/tokenize', { prompt: 5 }, 'prompt'],
    ['/tokenize', { prompt: 'a', model: 'x' }, 'model'],
    ['/detokenize', {}, 'tokens'],
    ['/detokenize', { tokens: [259] }, 'tokens'],
    ['/detokenize', { tokens: 'abc' }, 'tokens'],
    ['/detokenize', { tokens: [1], x: 1 }, 'x'],
  ]
  for (const [path, body, param] of cases) {
    const { status, json } = await post(app.request, path, body)
    assert.ok(status === 400 || status === 404)
    assert.equal(json.error.param, param)
  }
})
