// Owns the contract of a chat template.

export interface ChatTemplate {
  render(
    messages: readonly Record<string, unknown>[],
    options: { tools?: readonly unknown[]; addGenerationPrompt: boolean },
  ): string
}
