# Owns the judgement of greedy answers by transformers in float32: for each token that was chosen,
# how far its logit is below the largest, over the root mean square of the logits. Reads a list of
# {folder, answers: [{tokens, prompt}]} from stdin; prints the largest such distance of each.
import json, sys
import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def judge(folder, answers):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    worst, chosen, exact = 0.0, 0, 0
    for answer in answers:
        tokens = torch.tensor([answer["tokens"]], device="cuda")
        logits = model(tokens).logits[0, answer["prompt"] - 1 : -1].double()
        picked = tokens[0, answer["prompt"] :]
        largest = logits.max(dim=-1)
        gap = largest.values - logits.gather(1, picked[:, None])[:, 0]
        worst = max(worst, (gap / logits.square().mean(dim=-1).sqrt()).max().item())
        chosen += len(picked)
        exact += (largest.indices == picked).sum().item()
    return {"worst": worst, "chosen": chosen, "exact": exact}


print(json.dumps([judge(**asked) for asked in json.load(sys.stdin)]))
