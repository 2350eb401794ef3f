// Holds the default model's own vocabulary and template to Hugging Face's libraries
// (tools/goldens/text_smollm2.py). Needs its file: LATTICE_TEST_MODEL, or the local store.

import assert from 'node:assert/strict'
import { existsSync, readFileSync } from 'node:fs'
import { test } from 'node:test'
import type { Model } from '../model/model.ts'
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

/** The model module, where this checkout has one. */
interface ModelModules {
  openModel(path: string): Model
  storedPath(): string | undefined
}

const read = (name: string): unknown =>
  JSON.parse(readFileSync(new URL(`./goldens/${name}.json`, import.meta.url), 'utf8'))

async function modelModules(): Promise<ModelModules | undefined> {
  const at = (name: string): string => new URL(`../model/${name}.ts`, import.meta.url).href
  if (!existsSync(new URL(at('load')))) return undefined
  const { openModel } = (await import(at('load'))) as Pick<ModelModules, 'openModel'>
  const { Store } = (await import(at('store'))) as {
    Store: new () => { find(name: string): object | undefined; paths(found: object): string[] }
  }
  const { DEFAULT_MODEL } = (await import(at('registry'))) as { DEFAULT_MODEL: { name: string } }
  return {
    openModel,
    storedPath() {
      const store = new Store()
      const found = store.find(DEFAULT_MODEL.name)
      return found === undefined ? undefined : store.paths(found)[0]
    },
  }
}

const modules = await modelModules()
const path = process.env['LATTICE_TEST_MODEL'] ?? modules?.storedPath()
const model = modules === undefined || path === undefined ? undefined : modules.openModel(path)
const isDefault = model?.metadata.get('tokenizer.ggml.pre') === 'smollm'
const skip =
  modules === undefined
    ? 'SKIPPED: this checkout has no src/model/load.ts'
    : path === undefined
      ? 'SKIPPED: no model; set LATTICE_TEST_MODEL to the default model’s .gguf file'
      : isDefault
        ? false
        : 'SKIPPED: LATTICE_TEST_MODEL is not the default model'

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
