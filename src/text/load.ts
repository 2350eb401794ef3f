// Owns the choice of a model's tokenizer and chat template by its file format.

import { LatticeError } from '../errors.ts'
import type { Model } from '../model/model.ts'
import { type ChatTemplate, compileChatTemplate } from './chat-template.ts'
import { ggufTokenizer } from './load-gguf.ts'
import { jsonTokenizer, type NamedTokens } from './load-json.ts'
import type { Tokenizer } from './tokenizer.ts'

/**
 * Builds the tokenizer of a model.
 *
 * @throws LatticeError `tokenizer_invalid` if the model's data are damaged or missing,
 *   `model_unsupported` if they ask for something this version does not know
 */
export function loadTokenizer(model: Model): Tokenizer {
  if (model.format === 'gguf') return ggufTokenizer(model.metadata)
  if (model.tokenizerJson === undefined || model.tokenizerJson === null) {
    throw new LatticeError('tokenizer_invalid', 'The model directory has no tokenizer.json.', {
      todo: 'Fetch tokenizer.json from where the model came from, or use a GGUF file.',
    })
  }
  return jsonTokenizer(model.tokenizerJson, namedTokens(model))
}

/**
 * The model's chat template, or undefined if it has none.
 *
 * @param tokenizer the model's, for the text of its begin and end tokens
 * @throws LatticeError `template_invalid` if it is not a Jinja template
 */
export function loadChatTemplate(
  model: Model,
  tokenizer: Tokenizer = loadTokenizer(model),
): ChatTemplate | undefined {
  if (model.chatTemplate === undefined) return undefined
  const withTools = model.metadata.get('tokenizer.chat_template.tool_use')
  return compileChatTemplate(model.chatTemplate, {
    toolUse: typeof withTools === 'string' ? withTools : undefined,
    tokens: tokenTexts(model, tokenizer),
  })
}

/** The special tokens that templates name, as text. */
function tokenTexts(model: Model, tokenizer: Tokenizer): Record<string, string> {
  const texts: Record<string, string> = {}
  const names = { bos: 'bos_token', eos: 'eos_token', unknown: 'unk_token', padding: 'pad_token' }
  for (const [key, name] of Object.entries(names)) {
    const token = model.metadata.get(`tokenizer.ggml.${key}_token_id`)
    const configured = configuredToken(model, name)
    if (configured !== undefined) texts[name] = configured
    else if (typeof token === 'number') texts[name] = tokenizer.tokenText(token)
  }
  if (tokenizer.bosToken !== undefined) {
    texts['bos_token'] ??= tokenizer.tokenText(tokenizer.bosToken)
  }
  if (tokenizer.eosTokens.length > 0) {
    texts['eos_token'] ??= tokenizer.tokenText(tokenizer.eosTokens[0]!)
  }
  return texts
}

function namedTokens(model: Model): NamedTokens {
  return {
    bos: configuredToken(model, 'bos_token'),
    eos: configuredToken(model, 'eos_token'),
    ends: model.eosTokens ?? [],
  }
}

/** tokenizer_config.json writes a token as its text or as an object that holds it. */
function configuredToken(model: Model, name: string): string | undefined {
  const config = model.tokenizerConfig
  if (typeof config !== 'object' || config === null) return undefined
  const token: unknown = (config as Record<string, unknown>)[name]
  const content =
    typeof token === 'object' && token !== null && 'content' in token ? token.content : token
  return typeof content === 'string' ? content : undefined
}
