# Owns the other side of `lattice bench gpu --part serve`: Hugging Face transformers' continuous
# batching (`generate_batch`) of an 8B Llama with random weights, on the same prompts' sizes.
#
# stdin: {"sequences", "promptTokens", "outputTokens", "runs", "config": LlamaConfig's fields};
# stdout: {"tokensPerSecond": [of each run]}. The first run warms up and is left out.

import json
import sys
import time

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

given = json.load(sys.stdin)
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    model = LlamaForCausalLM(LlamaConfig(**given["config"])).eval()
# Of its ways of attention the one that was faster (flash_attention_2 needs a package of its own).
model.set_attn_implementation("paged|sdpa")
generator = torch.Generator().manual_seed(1)
prompts = [
    torch.randint(10, 100_000, (given["promptTokens"],), generator=generator).tolist()
    for _ in range(given["sequences"])
]
# No token ends an answer: all of them are as long as they may be.
options = GenerationConfig(
    max_new_tokens=given["outputTokens"], do_sample=False, eos_token_id=-1, pad_token_id=0
)
rates = []
for _ in range(1 + given["runs"]):
    start = time.perf_counter()
    outputs = model.generate_batch(inputs=prompts, generation_config=options)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    rates.append(sum(len(one.generated_tokens) for one in outputs.values()) / seconds)
json.dump({"tokensPerSecond": rates[1:]}, sys.__stdout__)
