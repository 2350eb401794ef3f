// Owns one build of the CPU library's turn at every tensor type, in a process of its own: two
// builds in one process would share ggml's tables. argv: BUILD. Sends {type: error} to its parent.

import { TYPES, typedError, typedModel } from './typed-model.ts'

const [variant] = process.argv.slice(2)
const results = TYPES.map((type) => [type, typedError(typedModel(type), variant)])
process.send?.(Object.fromEntries(results))
