"""Writes test/arch/goldens/beams/: a tiny random model as transformers saves it, and in beams.json what
its `generate` finds with beam search on it, in float32 on a CPU.

Usage: python tools/goldens/beams.py test/arch/goldens/beams
Needs: transformers 5, torch

A prompt is taken only if small noise on the logits changes nothing about its searches: ours are
computed with keys and values in half precision.
"""

import itertools
import json
import os
import shutil
import sys
from collections import Counter

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessor, LogitsProcessorList

BEAMS = (8, 4, 2)
LENGTH_PENALTIES = (0.5, 1.0, 2.0)
EARLY_STOPPING = (True, False, "never")
PROMPT_TOKENS = 9
NEW_TOKENS = 16
NOISE = 0.0005
ROUNDS = 4

VOCAB = 192
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=True,
)


class Noise(LogitsProcessor):
    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids, scores):
        return scores + NOISE * torch.randn(scores.shape, generator=self.generator)


def search(model, prompt, eos, beams, penalty, early, noise=None):
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=penalty,
            early_stopping=early,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=eos or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            logits_processor=LogitsProcessorList([Noise(noise)] if noise is not None else []),
        )
    hypotheses = []
    for sequence, score in zip(out.sequences.tolist(), out.sequences_scores.tolist()):
        tokens = sequence[len(prompt) :]
        ends = [i for i, token in enumerate(tokens) if token in eos]
        hypotheses.append(dict(tokens=tokens[: ends[0] + 1] if ends else tokens, score=round(score, 6)))
    return hypotheses


def searches(model, prompt, eos):
    """All searches of a prompt, or None if one of them hangs on a hair."""
    found = []
    for beams, penalty, early in itertools.product(BEAMS, LENGTH_PENALTIES, EARLY_STOPPING):
        exact = search(model, prompt, eos, beams, penalty, early)
        for round_ in range(ROUNDS):
            noisy = search(model, prompt, eos, beams, penalty, early, round_)
            if [h["tokens"] for h in noisy] != [h["tokens"] for h in exact]:
                return None
        found.append(dict(width=beams, lengthPenalty=penalty, earlyStopping=early, hypotheses=exact))
    return found


def make_model(folder):
    """Logits have a spread of about 0.8: some tokens are likely, and no rounding error is large."""
    generator = torch.Generator().manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    for name, weight in model.named_parameters():
        random = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1:
            weight.data = 1 + random * 0.1
        else:
            weight.data = random * (0.1 if "embed_tokens" in name else 1 / weight.shape[1] ** 0.5)
    model.save_pretrained(folder)
    # Text is not what this model is for, but a directory without a tokenizer is no model.
    with open(f"{folder}/tokenizer.json", "w") as file:
        file.write("{}\n")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    return model.eval()


def main(folder):
    shutil.rmtree(folder, ignore_errors=True)
    model = make_model(folder)
    cases = []
    for stops in (0, 1, 3):
        for seed in itertools.count():
            generator = torch.Generator().manual_seed(1000 * stops + seed)
            prompt = torch.randint(2, VOCAB, (PROMPT_TOKENS,), generator=generator).tolist()
            # End tokens that come up: the commonest in where beams are after a few tokens.
            likely = search(model, prompt, [], 8, 1.0, False)
            common = Counter(token for h in likely for token in set(h["tokens"][3:]))
            eos = [token for token, _ in common.most_common(stops)]
            found = searches(model, prompt, eos)
            if found is None:
                continue
            ended = sum(h["tokens"][-1] in eos for s in found for h in s["hypotheses"])
            lengths = sorted({len(h["tokens"]) for s in found for h in s["hypotheses"]})
            if stops and (len(lengths) < 5 or ended < 30):
                print(f"seed {seed}: only {ended} ended, lengths {lengths}", flush=True)
                continue
            print(f"{stops} end tokens: seed {seed}, {ended} hypotheses ended, lengths {lengths}", flush=True)
            cases.append(dict(prompt=prompt, stopTokens=eos, maxTokens=NEW_TOKENS, searches=found))
            break
    with open(f"{folder}/beams.json", "w") as file:
        json.dump(cases, file, separators=(",", ":"))
        file.write("\n")
    for file in os.listdir(folder):
        os.chmod(f"{folder}/{file}", 0o644)


main(sys.argv[1])
