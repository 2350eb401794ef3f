// Owns GET /v1/models and /v1/models/ID: the one model that is served.

import type { RouteContext, ServerContext } from '../context.ts'
import { checkModel } from './parameters.ts'

export function models(context: ServerContext) {
  return (c: RouteContext): Response => c.json({ object: 'list', data: [modelJson(context)] })
}

export function model(context: ServerContext) {
  return (c: RouteContext): Response => {
    checkModel(c.req.param('id') ?? '', context.engine.model)
    return c.json(modelJson(context))
  }
}

function modelJson(context: ServerContext): object {
  const { id, contextLength } = context.engine.model
  return {
    id,
    object: 'model',
    created: context.loadedAt,
    owned_by: 'lattice',
    max_model_len: contextLength,
  }
}
