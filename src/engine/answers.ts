// Owns the answers to questions about what is cached, and doing what is told of it.

import type { EngineAnswers, EngineQuestion } from './api.ts'
import type { Sessions } from './sessions.ts'
import type { PromptSharing } from './sharing.ts'

export function answerOf(
  question: Exclude<EngineQuestion, { kind: 'map' }>,
  sharing: PromptSharing,
  sessions: Sessions | undefined,
  nowMs: number,
): EngineAnswers[keyof EngineAnswers] {
  if (question.kind === 'forgotten') return sharing.forgotten()
  const { kind, tenant } = question
  if (kind === 'watch') return sharing.watch(tenant, question.tokens, question.prefixes)
  if (kind === 'pinned') return sharing.pinned(nowMs, tenant)
  if (kind === 'unpin') return sharing.unpin(tenant, question.id)
  if (kind === 'sessions') return sessions?.list(tenant, nowMs) ?? []
  if (kind === 'offload') return sessions?.moveOut(tenant, question.id) ?? 'unknown'
  return sessions?.moveIn(tenant, question.id) ?? 'unknown'
}
