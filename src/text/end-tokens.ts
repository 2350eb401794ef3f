// Owns which tokens end a turn or a text: those the metadata names, and those whose text is known
// to, since a chat must stop even where a model's metadata names only one of its two.

/** Spellings that end a turn or a text in some family of models. */
const ENDINGS: ReadonlySet<string> = new Set([
  '<|eot_id|>',
  '<|eom_id|>',
  '<|im_end|>',
  '<|end|>',
  '<|return|>',
  '<|call|>',
  '<end_of_turn>',
  '<turn|>',
  '<|endoftext|>',
  '<|end_of_text|>',
  '<|end_of_sentence|>',
  '<｜end▁of▁sentence｜>',
  '<end_of_utterance>',
  '<EOT>',
  '[EOT]',
  '[EOS]',
  '<eos>',
])

/** The same of code models: padding, a new repository, a new file. */
const CODE_ENDINGS: ReadonlySet<string> = new Set([
  '<|fim_pad|>',
  '<fim-pad>',
  '<fim_pad>',
  '<|fim_repo|>',
  '<|repo_name|>',
  '<fim-repo>',
  '<reponame>',
  '<|file_sep|>',
])

/**
 * @param tokens spelling by id
 * @param named ids that metadata names as ends
 * @param isSpecial `</s>` and the code endings count only as special tokens: elsewhere the first
 *   is HTML for struck text
 */
export function endTokens(
  tokens: readonly (string | undefined)[],
  named: Iterable<number | undefined>,
  isSpecial: (token: number) => boolean,
): number[] {
  const ends = new Set<number>()
  for (const token of named) if (token !== undefined) ends.add(token)
  tokens.forEach((spelling, token) => {
    if (spelling === undefined) return
    if (ENDINGS.has(spelling)) ends.add(token)
    if ((spelling === '</s>' || CODE_ENDINGS.has(spelling)) && isSpecial(token)) ends.add(token)
  })
  // A model that returns or calls uses <|end|> between its own messages (the harmony format).
  const has = (spelling: string): boolean => [...ends].some((token) => tokens[token] === spelling)
  if (has('<|return|>') && has('<|call|>')) {
    for (const token of ends) if (tokens[token] === '<|end|>') ends.delete(token)
  }
  return [...ends].sort((a, b) => a - b)
}
