// Owns the Qwen2 family (also 2.5): Llama's block with biases on q, k and v, which a program picks
// up from the file by itself. Qwen2 Technical Report 2024, arXiv:2407.10671.

export { llama as qwen2 } from './llama.ts'
