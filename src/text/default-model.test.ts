// Holds the default model's own vocabulary and template to Hugging Face's libraries
// (tools/goldens/text_smollm2.py).

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import { defaultModelPath, WITHOUT_MODEL } from '../../test/support/default-model.ts'
import { openModel } from '../model/load.ts'
import type { ChatMessage } from './chat-template.ts'
import { loadChatTemplate, loadTokenizer } from './load.ts'

interface Golden {
  strings: string[]
  plain: number[][]
  parsed: number[][]
  nasty: number[][]
  messages: ChatMessage[]
  chat: string
  chatIds: number[]
}

const read = (name: string): unknown =>
  JSON.parse(readFileSync(new URL(`./goldens/${name}.json`, import.meta.url), 'utf8'))

const path = defaultModelPath()
const model = path === undefined ? undefined : openModel(path)
const skip = model === undefined ? WITHOUT_MODEL : false

test("the default model: a token differs from Hugging Face's", { skip }, () => {
  const golden = read('models/smollm2-135m-instruct') as Golden
  const tokenizer = loadTokenizer(model!)
  const encode = (text: string, parseSpecial: boolean): number[] => [
    ...tokenizer.encode(text, { addSpecial: false, parseSpecial }),
  ]
  golden.strings.forEach((text, i) => {
    assert.deepEqual(encode(text, false), golden.plain[i], JSON.stringify(text))
    assert.deepEqual(encode(text, true), golden.parsed[i], JSON.stringify(text))
  })
  const strings = read('strings') as string[]
  strings.forEach((text, i) => {
    assert.deepEqual(encode(text, false), golden.nasty[i], JSON.stringify(text))
  })
})

test("the default model: its template renders otherwise than transformers'", { skip }, () => {
  const golden = read('models/smollm2-135m-instruct') as Golden
  const tokenizer = loadTokenizer(model!)
  const chat = loadChatTemplate(model!, tokenizer)!.render(golden.messages, {
    addGenerationPrompt: true,
  })
  assert.equal(chat, golden.chat)
  const ids = [...tokenizer.encode(chat, { addSpecial: true, parseSpecial: true })]
  assert.deepEqual(ids, golden.chatIds)
  assert.deepEqual(
    tokenizer.eosTokens.map((id) => tokenizer.tokenText(id)),
    ['<|endoftext|>', '<|im_end|>', '<reponame>'],
  )
})

test('the default model: starting waits for the tokenizer', { skip }, () => {
  const start = performance.now()
  loadTokenizer(model!)
  const ms = performance.now() - start
  // 50 ms where nothing else runs; a second start has 2 s for everything.
  assert.ok(ms < 1000, `${ms.toFixed(0)} ms`)
})
